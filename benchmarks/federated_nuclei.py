"""Federated training on cell nuclei, divided by image type as hospitals would be; all take equally many steps.

Four sites: fluorescence of 256 x 256, larger fluorescence, purple sections, bright fields. Centralised, each site
alone, fedavg, fedprox, FedBN and fedavg with differential privacy at the sites, three seeds each; Dice on test images.

    ML_SRC_DATA=DATA python benchmarks/federated_nuclei.py [--seeds 3] [--rounds 10]

What was trained before is taken from the result file, so that it can be stopped and started again.
"""

import argparse
import json
import math
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from _report import RESULTS, machine

import ml_src.core.inference.measure
from ml_src.core.atomic import write_json
from ml_src.core.config import Config
from ml_src.core.config_file import parse_config
from ml_src.core.data import checks
from ml_src.core.data.files import find_pairs
from ml_src.core.data.split_files import index_files
from ml_src.core.data.splits import make_splits
from ml_src.core.federated.simulation import train as train_sites
from ml_src.core.inference.measure import Measuring, compare_split
from ml_src.core.inference.predictor import Options
from ml_src.core.inference.torch_member import open_checkpoint
from ml_src.core.metrics.segmentation import summarize
from ml_src.core.trainers import train

SITES = ["fluorescence_256", "fluorescence_large", "purple_sections", "bright_fields"]
LOCAL_EPOCHS, BATCH, SIDE, CROP = 2, 4, 256, 128
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # of Student's distribution, by the number of seeds


def kind(path: Path) -> str:
    """The site of an image, by its colours and its size."""
    image = cv2.imread(str(path))
    colour = float((image.max(axis=2).astype(int) - image.min(axis=2)).mean())
    if colour < 3 and image.mean() < 90:
        return SITES[0] if image.shape[:2] == (256, 256) else SITES[1]
    return SITES[2] if colour >= 3 and image.mean() <= 180 else SITES[3]


def divide(data: Path, work: Path) -> None:
    """Write the index files of each site, a split of its own, and of all together."""
    pairs = find_pairs(data / "images", data / "masks")
    kinds = [kind(pair.image) for pair in pairs]
    whole: dict[str, str] = {}
    for site in SITES:
        own = [pair for pair, name in zip(pairs, kinds, strict=True) if name == site]
        facts = checks.scan(own, None)
        drawn = make_splits([fact.counts for fact in facts], None, 1, 0.25, 0.12, True, 0)
        files = index_files(drawn, own, data)
        _write(work / site, files)
        for name, text in files.items():
            whole[name] = whole.get(name, "") + text
    _write(work / "all", whole)


def _write(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def config_of(data: Path, work: Path, name: str, seed: int, **changes: Any) -> Config:
    raw = {
        "seed": seed,
        "run_name": f"{name}_{seed}",
        "data": {"data_dir": str(data), "num_classes": 2, "splits_dir": str(work / "all")},
        "model": {"base_channels": 8},
        "loss": {"type": "dice_bce_loss"},
        "training": {"trainer_type": "mixed_precision", "batch_size": BATCH, "num_workers": 0},
        "optimizer": {"type": "adam", "lr": 0.002},
        "scheduler": {"type": "cosine"},
        "transforms": {
            "train": [
                {"type": "resize", "size": [SIDE, SIDE]},
                {"type": "random_crop", "size": [CROP, CROP]},
                {"type": "random_horizontal_flip", "p": 0.5},
                {"type": "random_vertical_flip", "p": 0.5},
                {"type": "normalize", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
            ],
            "val": [
                {"type": "resize", "size": [SIDE, SIDE]},
                {"type": "normalize", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
            ],
        },
    }
    return parse_config(raw, changes)


def federated(data: Path, work: Path, name: str, seed: int, rounds: int, **changes: Any) -> Config:
    section = {
        "sites": [str(work / site) for site in SITES],
        "rounds": rounds,
        "local_epochs": LOCAL_EPOCHS,
        "backend": "mixed_precision",
    }
    changes = {"training.trainer_type": "federated", "federated": section} | changes
    return config_of(data, work, name, seed, **changes)


def num_steps(work: Path, site: str) -> int:
    return -(-len((work / site / "fold_0_train_images.txt").read_text().splitlines()) // BATCH)


def trainings(data: Path, work: Path, seed: int, rounds: int) -> dict[str, Callable[[], dict[str, Path]]]:
    """Each training by name; it returns the checkpoint that each site uses."""
    total = rounds * LOCAL_EPOCHS * sum(num_steps(work, site) for site in SITES)

    def one(config: Config) -> dict[str, Path]:
        return dict.fromkeys(SITES, train(config, overwrite=True).run_dir / "weights" / "best.pt")

    def many(config: Config) -> dict[str, Path]:
        run = train_sites(config, overwrite=True).run_dir
        assert config.federated is not None
        if config.federated.personalize == "batch_norm":
            return {site: run / "sites" / site / "weights" / "personal.pt" for site in SITES}
        return dict.fromkeys(SITES, run / "weights" / "best.pt")

    found = {"centralised": lambda: one(config_of(data, work, "centralised", seed, **epochs("all")))}

    def epochs(site: str) -> dict[str, Any]:
        return {"training.num_epochs": max(1, round(total / num_steps(work, site)))}

    for site in SITES:
        own = {"data.splits_dir": str(work / site)} | epochs(site)
        found[f"alone: {site}"] = lambda site=site, own=own: one(config_of(data, work, f"alone_{site}", seed, **own))
    prox = {"federated.strategy": {"type": "fedprox", "proximal_mu": 0.01}}
    dp = {
        "federated.backend": "dp",
        "model.norm": "group",
        "training.dp": {"target_epsilon": 8.0, "target_delta": 1e-3, "max_grad_norm": 1.0},
    }
    found["fedavg"] = lambda: many(federated(data, work, "fedavg", seed, rounds))
    group = {"model.norm": "group"}
    found["fedavg, group norm"] = lambda: many(federated(data, work, "fedavg_group", seed, rounds, **group))
    found["fedprox"] = lambda: many(federated(data, work, "fedprox", seed, rounds, **prox))
    found["fedbn"] = lambda: many(
        federated(data, work, "fedbn", seed, rounds, **{"federated.personalize": "batch_norm"})
    )
    found["fedavg + dp"] = lambda: many(federated(data, work, "fedavg_dp", seed, rounds, **dp))
    # the small sites take as many steps as the large ones, and all together as many as before
    same = {"federated.local_epochs": None, "federated.local_steps": round(total / (rounds * len(SITES)))}
    found["fedavg, group norm, local_steps"] = lambda: many(
        federated(data, work, "fedavg_group_steps", seed, rounds, **group, **same)
    )
    found["fedbn, local_steps"] = lambda: many(
        federated(data, work, "fedbn_steps", seed, rounds, **same, **{"federated.personalize": "batch_norm"})
    )
    return found


def scores(data: Path, work: Path, checkpoints: dict[str, Path]) -> dict[str, Any]:
    """Mean Dice of both classes, and Dice of nuclei, on the test images of each site and of all, at their own size."""
    matrices = {}
    for site in SITES:
        own = {"data.splits_dir": str(work / site)}
        member = open_checkpoint(checkpoints[site], "auto", [], own, "auto", False)
        matrices[site] = compare_split([member], "test", Options(batch_size=1), [], Measuring()).matrix
    total = np.sum(list(matrices.values()), axis=0)
    return {name: dice(matrix) for name, matrix in {**matrices, "all": total}.items()}


def dice(matrix: Any) -> dict[str, float]:
    found = summarize(matrix, 255)
    return {"mean": float(found["dice"]), "nucleus": float(found["dice_per_class"][1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--work", type=Path, default=Path("nuclei"))
    parser.add_argument("--only", nargs="*", default=None, help="names of trainings")
    args = parser.parse_args()
    data = Path(os.environ.get("ML_SRC_DATA", "../shared/data")).resolve() / "dsb2018_nuclei"
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    divide(data, work)
    os.chdir(work)
    ml_src.core.inference.measure.MOST_PIXELS = 0  # outlines are not asked for here, and take longer than the rest
    path = RESULTS / "federated_nuclei.json"
    known = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    known |= {"machine": machine(), "rounds": args.rounds, "local_epochs": LOCAL_EPOCHS, "batch": BATCH, "crop": CROP}
    for seed in range(args.seeds):
        for name, work_it in trainings(data, work, seed, args.rounds).items():
            key = f"{name} seed {seed}"
            if key in known["runs"] or (args.only and name not in args.only):
                continue
            print(key, flush=True)
            known["runs"][key] = scores(data, work, work_it())
            print(f"  {known['runs'][key]['all']}", flush=True)
            write_json(path, known)
    print(table(known["runs"], args.seeds))


def table(runs: dict[str, Any], seeds: int) -> str:
    """Dice of nuclei: mean over the seeds, and a 95 % interval of that mean (Student)."""
    names = list(dict.fromkeys(key.rpartition(" seed ")[0] for key in runs))
    lines = [f"| training | {' | '.join(SITES)} | all |", "| --- " * (len(SITES) + 2) + "|"]
    for name in names:
        cells = []
        for site in [*SITES, "all"]:
            values = [runs[f"{name} seed {n}"][site]["nucleus"] for n in range(seeds) if f"{name} seed {n}" in runs]
            half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.3f} ± {half:.3f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
