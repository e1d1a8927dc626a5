"""ml-train: from a configuration to a measured model."""

from collections.abc import Sequence
from pathlib import Path

from ml_src.cli._app import Parser, run

# flag -> configuration key that it overrides
OVERRIDES = {
    "fold": ("data.fold", int, "which fold is held out for validation"),
    "batch_size": ("training.batch_size", int, "images a batch"),
    "num_epochs": ("training.num_epochs", int, "passes over the training images"),
    "lr": ("optimizer.lr", float, "learning rate"),
    "loss": ("loss.type", str, "dice_loss, dice_bce_loss, iou_loss, cross_entropy, focal_loss"),
    "num_workers": ("training.num_workers", int, "processes that read images"),
    "device": ("training.device", str, "auto, cpu, cuda, cuda:1, mps"),
    "seed": ("seed", int, "all randomness is a function of it"),
    "run_name": ("run_name", str, "name of the run folder; default: the data set's"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ml-train."""
    return run(_train, argv)


def _train(argv: Sequence[str]) -> int:
    parser = Parser("ml-train", "Train a model as a configuration says, and measure it on images it has not seen.")
    parser.add_argument("--config", type=Path, help="YAML file that ml-init-config wrote")
    parser.add_argument("--resume", type=Path, metavar="RUN_DIR|CHECKPOINT", help="go on with a stopped run")
    parser.add_argument("--overwrite", action="store_true", help="remove an existing run of the same name")
    parser.add_argument("--profile", action="store_true", help="measure 20 steps (training.profile)")
    parser.add_argument("--plugin", nargs="+", default=[], metavar="FILE.py", help="own models and losses to import")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="SECTION.KEY=VALUE", help="any key")
    for flag, (key, kind, text) in OVERRIDES.items():
        parser.add_argument(f"--{flag}", type=kind, help=f"{text} ({key})")
    args = parser.parse(argv)
    if args.config is None and args.resume is None:
        parser.error("give --config FILE, or --resume RUN_DIR")
    if args.resume is not None and (args.overwrite or args.run_name):
        parser.error("--resume goes on in the run's own folder: leave out --overwrite and --run_name")

    from ml_src.core.config_file import load_config, parse_set

    overrides = {key: getattr(args, flag) for flag, (key, _, _) in OVERRIDES.items() if getattr(args, flag) is not None}
    overrides |= dict(parse_set(assignment) for assignment in args.set)
    if args.profile:
        overrides["training.profile"] = True
    config = None if args.config is None else load_config(args.config, overrides)

    from ml_src.core.trainers import train
    from ml_src.core.trainers.launch import launched, relaunch
    from ml_src.core.trainers.resume import checkpoint_config, checkpoint_of
    from ml_src.core.trainers.run_dir import command

    checkpoint = None if args.resume is None else checkpoint_of(args.resume)
    if config is None:
        assert checkpoint is not None
        config = checkpoint_config(checkpoint, overrides, args.plugin)
    elif args.plugin:  # the checkpoints name them too
        config = config.model_copy(update={"plugins": list(dict.fromkeys([*config.plugins, *args.plugin]))})
    num_processes = config.training.num_processes or 1
    if num_processes > 1 and not launched():
        run_dir = config.run_dir if checkpoint is None else checkpoint.parent.parent
        resume = command("ml-train --resume", run_dir, config)
        return relaunch(num_processes, ["-m", "ml_src.cli.train", *argv], resume)
    if config.training.trainer_type == "federated":
        from ml_src.core.federated.simulation import train as train_sites

        outcome = train_sites(config, checkpoint, args.overwrite)
    else:
        outcome = train(config, checkpoint, args.overwrite)
    if outcome.summary:
        print(outcome.summary)
    return 130 if outcome.interrupted else 0


if __name__ == "__main__":
    raise SystemExit(main())
