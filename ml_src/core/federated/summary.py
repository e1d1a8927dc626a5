"""The end of a federated run: its best round measured on the images of every site, alone and all together."""

import logging
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ml_src.core.atomic import write_json, write_text
from ml_src.core.checkpoint import load_checkpoint, load_weights
from ml_src.core.device import choose_device
from ml_src.core.errors import MLError
from ml_src.core.federated.journal import Journal
from ml_src.core.federated.site import PERSONAL, Site
from ml_src.core.inference.measure import TITLES, Comparison, Measuring, compare_split, report, results
from ml_src.core.inference.predictor import Options
from ml_src.core.inference.torch_member import TorchMember, placed
from ml_src.core.network import build_model
from ml_src.core.tasks import task_for
from ml_src.core.tasks.segmentation import findings
from ml_src.core.trainers.run_dir import command

log = logging.getLogger("ml_src")


def measure(journal: Journal, sites: Mapping[str, Site]) -> str:
    """Evaluate the best weights on the validation and test images of all sites; write summary.txt and metrics.json.

    Returns the summary. metrics.json is written last: its presence says that the run is finished.
    """
    config, run_dir = journal.config, journal.run_dir
    device = choose_device(config.training.device)
    best = load_checkpoint(run_dir / "weights" / "best.pt", device)
    found: dict[str, dict[str, Comparison]] = {"val": {}, "test": {}}
    for name, site in sites.items():
        try:
            for split, comparison in _measured(site, journal, best, device):
                found[split][name] = comparison
        except MLError as error:  # its images are gone: those of the others can be measured
            log.warning("%s is not measured: %s", name, error)
    reports = {
        split: _report(parts, config.class_names, config.ignore_index) for split, parts in found.items() if parts
    }
    of_sites = {
        name: {split: _report({name: parts[name]}, config.class_names, config.ignore_index)
               for split, parts in found.items() if name in parts}
        for name in sites
    }  # fmt: skip
    counts = journal.fingerprint.class_counts if journal.fingerprint is not None else []
    worth = findings(config.class_names, counts, best["metrics"], reports["val"], config.ignore_index) if counts else []
    summary = _text(journal, sites, worth, int(best["epoch"]), reports, of_sites)
    write_text(run_dir / "summary.txt", summary)
    contents = {
        "best_epoch": int(best["epoch"]),
        "num_epochs": len(journal.rounds),
        "seconds": round(journal.seconds(), 1),
        "best_epoch_metrics": {key: value if value == value else None for key, value in best["metrics"].items()},
        "findings": worth,
        **reports,
        "sites": of_sites,
    }
    write_json(run_dir / "metrics.json", contents)
    return summary


def _measured(
    site: Site, journal: Journal, best: Mapping[str, Any], device: torch.device
) -> Iterator[tuple[str, Comparison]]:
    """Yield each split of a site, and how the best weights, under FedBN the site's own, do on it."""
    config, path = journal.config, journal.run_dir / "weights" / "best.pt"
    network, own = build_model(config.model), site.keep_personal(best["epoch"])
    if own is not None:
        load_weights(network, load_checkpoint(own, device)["model_state_dict"], own)
    else:
        load_weights(network, best["model_state_dict"], path)
    settled = site.settled()
    member = TorchMember(path=path, config=settled, network=placed(network, device), device=device)
    for split in task_for(settled).measured_splits():
        log.info("Measuring round %d on %s of %s ...", best["epoch"], split, site.name)
        options, steps = Options(batch_size=config.training.batch_size), config.inference.postprocess
        yield split, compare_split([member], split, options, steps, Measuring())


def _report(parts: Mapping[str, Comparison], class_names: list[str], ignore_index: int) -> dict[str, Any]:
    """The scores over the images of several sites, from one confusion matrix."""
    images = [one for part in parts.values() for one in part.images]
    total = np.sum([part.matrix for part in parts.values()], axis=0)
    return report(Comparison(images, total), class_names, ignore_index, None, Measuring())


def _text(
    journal: Journal,
    sites: Mapping[str, Site],
    found: list[str],
    number: int,
    reports: dict[str, Any],
    of_sites: dict[str, Any],
) -> str:
    config, minutes = journal.config, journal.seconds() / 60
    lines = [f"{journal.run_dir}: best round {number} of {len(journal.rounds)}, {minutes:.1f} min"]
    if journal.stop:
        lines.append(f"Stopped early: {journal.stop}.")
    for split, one in reports.items():
        lines += ["", results(TITLES[split], one, config.ignore_index), "", f"  {TITLES[split]} of each site:"]
        for name, own in of_sites.items():
            if split in own:
                iou, dice = (own[split][key] for key in ("iou", "dice"))
                lines.append(f"    {name}: mean IoU {iou:.4f}, mean Dice {dice:.4f}, {own[split]['num_images']} images")
    if found:
        lines += ["", "Worth a look:", *(f"  - {sentence}" for sentence in found)]
    if config.federated is not None and config.federated.personalize == "batch_norm":
        lines += ["", f"Each site was measured with its own batch normalisation: sites/<name>/weights/{PERSONAL}."]
    split = "" if "test" in reports else " --split val"
    path = journal.run_dir / "weights" / "best.pt"
    folders = {site.config.data.data_dir for site in sites.values()} - {config.data.data_dir}
    where = f" --data_dir {shlex.quote(min(folders))}" if folders else ""  # each site has images of its own
    lines += ["", "Next: " + command("ml-inference --checkpoint_path", path, config) + where + split]
    return "\n".join(lines) + "\n"
