"""What does privacy cost a training step, in time and memory, beside the same network without it?

All have group normalisation and go through the loop of ml-train, except Opacus as its tutorial has it: its own samplers
and BatchMemoryManager, the same images in memory. Every contender is a process of its own; they take turns.
"""

import argparse
import statistics
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _report import report
from _turns import Epoch, ours, sample_data, take_turns

from ml_src.core.config_file import parse_config
from ml_src.core.losses import build_loss
from ml_src.core.network import build_model
from ml_src.core.tasks import task_for

WITHOUT = "standard, no privacy"
PRIVATE: dict[str, dict[str, Any]] = {
    "dp, flat": {},
    "dp, flat, whole batch at once": {"training.dp.max_physical_batch_size": "batch"},
    "dp, per_layer": {"training.dp.clipping": "per_layer"},
    "dp, flat, secure": {"training.dp.secure": True},
}
OPACUS = "Opacus' own hooks (NCHW)"


def raw_config(data: Path, base_channels: int, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "data": {"data_dir": str(data), "num_classes": 3},
        "model": {"base_channels": base_channels, "norm": "group"},
        "loss": {"type": "dice_bce_loss"},
        "training": {"batch_size": args.batch, "num_workers": 2, "device": "cpu"},
        "transforms": {"train": [{"type": "normalize", "mean": [0.5], "std": [0.25]}]},
    }


def opacus_epoch(raw: dict[str, Any], batch_size: int) -> Epoch:
    from opacus import PrivacyEngine

    warnings.simplefilter("ignore")
    config = parse_config(raw)
    task = task_for(config)
    batches = [task.prepare(batch, torch.device("cpu")) for batch in task.loader("train").epoch()]
    data = torch.utils.data.TensorDataset(*(torch.cat(parts).contiguous() for parts in zip(*batches, strict=True)))
    network = build_model(config.model)
    for layer in network.modules():
        if getattr(layer, "inplace", False):
            layer.inplace = False
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    model, optimizer, loader = PrivacyEngine().make_private(
        module=network,
        optimizer=optimizer,
        data_loader=torch.utils.data.DataLoader(data, batch_size),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    criterion = build_loss(config.loss.model_copy(update={"ignore_index": -100}))

    def epoch() -> int:
        model.train()
        for images, masks in loader:
            optimizer.zero_grad()
            criterion(model(images), masks).backward()
            optimizer.step()
        return len(data)

    return epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    rows = []
    for base_channels in args.channels:
        with tempfile.TemporaryDirectory() as folder:
            data = sample_data(Path(folder) / "data", args.steps * args.batch, args.size)
            raw = raw_config(data, base_channels, args)
            contenders = {WITHOUT: ours(raw, {}), OPACUS: partial(opacus_epoch, raw, args.batch)}
            for name, changes in PRIVATE.items():
                dp = {"training.trainer_type": "dp", "training.dp": {"noise_multiplier": 1.0, "accountant": "rdp"}}
                changes = {key: args.batch if value == "batch" else value for key, value in changes.items()}
                contenders[name] = ours(raw, dp | changes)
            speeds, memory = take_turns(contenders, args.rounds, args.threads)
            for name, speed in speeds.items():
                ratios = [a / b for a, b in zip(speeds[WITHOUT], speed, strict=True)]
                rows.append(
                    {
                        "channels": base_channels,
                        "trainer": name,
                        "images/s": statistics.median(speed),
                        "x time (median of pairs)": statistics.median(ratios),
                        "min": min(ratios),
                        "max": max(ratios),
                        "peak GiB": memory[name].peak,
                        "of which steps": memory[name].of_steps,
                        "x memory of steps": memory[name].of_steps / memory[WITHOUT].of_steps,
                    }
                )
    report("dp_step", vars(args), rows)


if __name__ == "__main__":
    main()
