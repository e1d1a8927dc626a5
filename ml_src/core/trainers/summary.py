"""The end of a run: its best weights measured, and what the numbers say in plain words."""

import logging
from typing import Any

from ml_src.core.atomic import write_json, write_text
from ml_src.core.checkpoint import load_checkpoint, load_weights
from ml_src.core.inference.measure import TITLES, Measuring, results, split_report
from ml_src.core.inference.predictor import Options
from ml_src.core.inference.torch_member import TorchMember, placed
from ml_src.core.network import build_model
from ml_src.core.trainers.run_dir import command
from ml_src.core.trainers.training import Training

log = logging.getLogger("ml_src")


def measure(t: Training) -> str:
    """Evaluate the best weights on the validation and test images; write summary.txt and metrics.json.

    Returns the summary. metrics.json is written last: its presence says that the run is finished.
    """
    path = t.run_dir / "weights" / "best.pt"
    best = load_checkpoint(path, t.device)
    network = build_model(t.config.model)  # not the one in training: it may be wrapped or divided
    load_weights(network, best["model_state_dict"], path)
    member = TorchMember(path=path, config=t.config, network=placed(network, t.device), device=t.device)
    options = Options(batch_size=t.train_loader.order.batch_size)  # which fitted into memory
    reports = {}
    for split in t.task.measured_splits():
        log.info("Measuring epoch %d on %s ...", best["epoch"], split)
        reports[split] = split_report([member], split, options, t.config.inference.postprocess, Measuring())
    found = t.task.findings(best["metrics"], reports)
    summary = _text(t, best["epoch"], reports, found)
    write_text(t.run_dir / "summary.txt", summary)
    contents = {
        "best_epoch": best["epoch"],
        "num_epochs": t.progress.epoch,
        "seconds": round(t.seconds(), 1),
        # JSON knows no NaN
        "best_epoch_metrics": {key: value if value == value else None for key, value in best["metrics"].items()},
        "findings": found,
        **reports,
    }
    write_json(t.run_dir / "metrics.json", contents)
    return summary


def _text(t: Training, epoch: int, reports: dict[str, dict[str, Any]], found: list[str]) -> str:
    lines = [f"{t.run_dir}: best epoch {epoch} of {t.progress.epoch}, {t.seconds() / 60:.1f} min"]
    if t.stop:
        lines.append(f"Stopped early: {t.stop}.")
    lines += t.backend.summary()
    for split, report in reports.items():
        lines += ["", results(TITLES[split], report, t.config.ignore_index)]
    if found:
        lines += ["", "Worth a look:", *(f"  - {sentence}" for sentence in found)]
    split = "" if "test" in reports else " --split val"
    lines += [
        "",
        "Next: " + command("ml-inference --checkpoint_path", t.run_dir / "weights" / "best.pt", t.config) + split,
    ]
    return "\n".join(lines) + "\n"
