"""What is on the disk of a federation: `weights/last.pt` is the last round that counts, all else follows from it.

last.pt holds the weights, the state of the server's strategy and the whole history; it is replaced as one file. So a
server that is killed at any moment goes on after that round. federation.json is the history, for people and programs.
"""

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ml_src.core.atomic import write_json
from ml_src.core.callbacks import StopEarly
from ml_src.core.checkpoint import load_checkpoint, previous_of, save_checkpoint
from ml_src.core.config import Config, EarlyStopping, ModelCheckpoint
from ml_src.core.config_file import plain
from ml_src.core.errors import CheckpointError
from ml_src.core.federated.facts import Fingerprint
from ml_src.core.federated_specs import FederatedConfig

MOST_TROUBLES = 200  # kept of what went wrong
log = logging.getLogger("ml_src")


class Journal:
    """Rounds that count, their scores, the best of them."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir
        sections = config.training.callbacks
        self.checkpoints = next(
            (one for one in sections if isinstance(one, ModelCheckpoint)), ModelCheckpoint(type="model_checkpoint")
        )
        self.early = next((StopEarly(one) for one in sections if isinstance(one, EarlyStopping)), None)
        self.fingerprint: Fingerprint | None = None
        self.rounds: list[dict[str, Any]] = []
        self.troubles: list[dict[str, Any]] = []
        self.best: float | None = None
        self.best_round = 0
        self.stop = ""
        self.started, self.seconds_before = time.monotonic(), 0.0
        self._writer: Any = None

    def restore(self, contents: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        own = contents["backend_state_dict"]["journal"]
        self.fingerprint = Fingerprint.model_validate(own["fingerprint"])
        self._settle()
        self.rounds, self.troubles = list(own["rounds"]), list(own["troubles"])
        self.best, self.best_round = own["best"], own["best_round"]
        self._go_by_best()
        if self.early is not None:
            self.early.load_state_dict(own["early_stopping"])
            self.stop = self.early.reason
        self.seconds_before = float(contents["seconds"])

    def _go_by_best(self) -> None:
        """Let best.pt say which round it is of: it is written before last.pt, and a kill may have come between."""
        path = self._path("best.pt")
        found = load_checkpoint(path) if path.exists() else None
        if found is None or found["epoch"] == self.best_round:
            return
        if found["epoch"] > len(self.rounds):  # of a round that is done again
            self.best, self.best_round = None, 0
            return
        own = found["backend_state_dict"]["journal"]
        self.best, self.best_round = own["best"], own["best_round"]
        self.rounds[self.best_round - 1] = own["rounds"][self.best_round - 1]  # with its scores

    def begin(self, fingerprint: Fingerprint) -> None:
        """Take the statistics of all sites, once and for all."""
        self.fingerprint = fingerprint
        self._settle()
        total = sum(fingerprint.num_images.values())
        log.info("%d sites with %d training images", len(fingerprint.num_images), total)

    def _settle(self) -> None:
        """Let the configuration, which goes into the checkpoints, say what the sites normalise with."""
        known = self.fingerprint
        assert known is not None
        if known.mean is not None and known.std is not None and self.config.needs_statistics:
            self.config = self.config.with_statistics(known.mean, known.std)
        if known.class_names and self.config.data.class_names is None:
            data = self.config.data.model_copy(update={"class_names": known.class_names})
            self.config = self.config.model_copy(update={"data": data})

    def trouble(self, site: str, what: str) -> None:
        """Remember what went wrong at a site."""
        self.troubles = [*self.troubles, {"round": len(self.rounds) + 1, "site": site, "what": what}][-MOST_TROUBLES:]

    def commit(self, entry: dict[str, Any], state: dict[str, Any]) -> None:
        """Let a round count: from here on it is not done again."""
        for site, why in entry["dropped"].items():
            self.trouble(site, f"its update was dropped: {why}")
        self.rounds.append(entry)
        self.save(state)
        loss = math.nan if entry["train_loss"] is None else entry["train_loss"]
        self._curves("train_loss", {"train": loss}, entry["round"])
        for name, key in (("train_loss_of_sites", "train_loss"), ("norm_of_updates", "norm")):
            known = {site: one[key] for site, one in entry["sites"].items() if one[key] is not None}
            self._curves(name, known, entry["round"])
        log.info(
            "round %d/%d: %d sites, train_loss %.4f, %.1f s",
            entry["round"], self._num_rounds, len(entry["sites"]), loss, entry["seconds"],
        )  # fmt: skip

    @property
    def _num_rounds(self) -> int:
        assert self.config.federated is not None
        return self.config.federated.rounds

    def measured(
        self, number: int, total: dict[str, float], sites: dict[str, dict[str, float]], state: dict[str, Any]
    ) -> None:
        """Enter the scores of the weights of round `number`, which `state` holds; keep them where they are the best."""
        entry = self.rounds[number - 1]
        entry["metrics"] = {f"val_{key}": _defined(value) for key, value in total.items()}
        entry["metrics"]["train_loss"] = entry["train_loss"]
        entry["metrics_of_sites"] = {
            site: {f"val_{key}": _defined(value) for key, value in scores.items()} for site, scores in sites.items()
        }
        self._curves_of_scores(number, total, sites)
        value = total[self.checkpoints.monitor.removeprefix("val_")]
        over = f" over {len(sites)} sites" if sites else ""  # which secure aggregation does not tell
        log.info(
            "round %d/%d: val_loss %.4f, val_iou %.4f%s", number, self._num_rounds, total["loss"], total["iou"], over
        )
        if self._is_better(number, value) or not self._path("best.pt").exists():
            self.best, self.best_round = None if math.isnan(value) else value, number
            save_checkpoint(self._path("best.pt"), self._contents(number, state))
        elif self.checkpoints.is_better(value, self.best):
            log.info("round %d stays the best one, by the sites that measured both", self.best_round)
        if self.early is not None:
            self.early.heed(total[self.early.section.monitor.removeprefix("val_")])
            self.stop = self.early.reason
            if self.stop:
                log.info("Stopped early: %s", self.stop)

    def _is_better(self, number: int, value: float) -> bool:
        """Whether a round is better than the best one; where other sites measured that, by those that measured both.

        Else a round would be the best because a site with hard images was away. Where too few measured both, the one
        that more have measured is the better. Under secure aggregation, where no site has scores of its own, there is
        nothing but the values over all.
        """
        best = self.best
        if best is None or number == self.best_round:  # measured again, after a kill
            return number == self.best_round or self.checkpoints.is_better(value, None)
        now, then = (self.rounds[one - 1]["metrics_of_sites"] for one in (number, self.best_round))
        both, either = sorted(now.keys() & then.keys()), now.keys() | then.keys()
        if 2 * len(both) < len(either) and len(now) != len(then):
            return len(now) > len(then) and not math.isnan(value)
        name = f"val_{self.checkpoints.monitor.removeprefix('val_')}"
        known = [site for site in both if then[site][name] is not None]
        if known and now.keys() != then.keys():
            value = _mean([now[site][name] for site in known])
            best = _mean([then[site][name] for site in known])
        return self.checkpoints.is_better(value, best)

    def skip(self, number: int, state: dict[str, Any]) -> None:
        """Pass over a round that cannot be done: the weights stay as they are."""
        self.rounds.append({"round": number, "seconds": 0.0, "train_loss": None, "sites": {}, "dropped": {}})
        self.save(state)

    def is_skipped(self, number: int) -> bool:
        """Whether a round was passed over."""
        return number > 0 and not self.rounds[number - 1]["sites"]

    def keep_some(self, number: int, state: dict[str, Any]) -> None:
        """Write best.pt where no round could be measured: the last one then."""
        if number and not self._path("best.pt").exists():
            log.warning("no round was measured: best.pt is the last one")
            self.best_round = number
            save_checkpoint(self._path("best.pt"), self._contents(number, state))

    def is_measured(self, number: int) -> bool:
        """Whether the scores of a round are known."""
        return number == 0 or "metrics" in self.rounds[number - 1]

    def save(self, state: dict[str, Any]) -> None:
        """Write last.pt, then federation.json."""
        save_checkpoint(self._path("last.pt"), self._contents(len(self.rounds), state), keep_previous=True)
        self.write()

    def write(self) -> None:
        """Write the history as JSON."""
        assert self.fingerprint is not None
        contents = {
            "strategy": self.config.federated.strategy.model_dump() if self.config.federated else None,
            "num_rounds": self._num_rounds,
            "best_round": self.best_round,
            "fingerprint": self.fingerprint.model_dump(),
            "rounds": self.rounds,
            "troubles": self.troubles,
        }
        write_json(self.run_dir / "federation.json", contents)

    def seconds(self) -> float:
        """How long the federation has taken, over all its resumes."""
        return self.seconds_before + time.monotonic() - self.started

    def close(self) -> None:
        """End the curves."""
        if self._writer is not None:
            self._writer.close()

    def _path(self, name: str) -> Path:
        return self.run_dir / "weights" / name

    def _contents(self, number: int, state: dict[str, Any]) -> dict[str, Any]:
        """Return a checkpoint of round `number`."""
        assert self.fingerprint is not None
        entry = self.rounds[number - 1] if number else {}
        metrics = {key: math.nan if value is None else float(value) for key, value in entry.get("metrics", {}).items()}
        journal = {
            "fingerprint": self.fingerprint.model_dump(),
            "rounds": self.rounds,
            "troubles": self.troubles,
            "best": self.best,
            "best_round": self.best_round,
            "stop": self.stop,
            "early_stopping": {} if self.early is None else self.early.state_dict(),
        }
        return {
            "model_state_dict": state["model_state_dict"],
            "raw_state_dict": {},
            "optimizer_state_dict": {},
            "scheduler_state_dict": {},
            "config": plain(self.config),
            "class_names": list(self.config.class_names),
            "epoch": number,
            "step": sum(_most_steps(entry) for entry in self.rounds[:number]),
            "epoch_step": 0,
            "metrics": metrics,
            "backend_state_dict": {key: value for key, value in state.items() if key != "model_state_dict"}
            | {"journal": json.loads(json.dumps(journal))},  # no number of NumPy's: a checkpoint holds plain data
            "callback_state_dicts": {},
            "batch_size": self.config.training.batch_size,
            "processes": [],
            "num_threads": torch.get_num_threads(),
            "seconds": self.seconds(),
        }

    # TensorBoard

    def _curves(self, name: str, values: Mapping[str, float], number: int) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            self._writer = SummaryWriter(self.run_dir / "tensorboard", purge_step=number)
        for key, value in values.items():
            self._writer.add_scalar(f"{name}/{key}", value, number)
        self._writer.flush()

    def _curves_of_scores(self, number: int, total: dict[str, float], sites: dict[str, dict[str, float]]) -> None:
        for key, value in total.items():
            name, _, of_class = key.partition("/")
            self._curves(f"val_{name}" if of_class else name, {of_class or "val": value}, number)
        for key in ("iou", "dice", "loss"):
            self._curves(f"{key}_of_sites", {site: scores[key] for site, scores in sites.items()}, number)


def _defined(value: float) -> float | None:
    """JSON knows no NaN."""
    return None if math.isnan(value) else value


def _mean(values: list[float | None]) -> float:
    """The mean; NaN where one is not defined."""
    return math.fsum(math.nan if value is None else value for value in values) / len(values)


def _most_steps(entry: Mapping[str, Any]) -> int:
    """Steps of the site that took most of them in a round; 0 where secure aggregation hides them."""
    return max((int(one["num_steps"] or 0) for one in entry["sites"].values()), default=0)


def require_same_federation(before: FederatedConfig | None, now: FederatedConfig, path: Path) -> None:
    """Refuse to go on with what would be another training; how long, and with how many at least, may change.

    Raises: CheckpointError.
    """
    free = {key: getattr(now, key) for key in ("rounds", "min_sites", "round_timeout")}
    if before is None or before.model_copy(update=free) != now:
        raise CheckpointError(
            f"{path} was trained with another section federated, of which only {', '.join(free)} may change: "
            "put it back, or start a new run"
        )


def set_aside(path: Path, last: Path) -> None:
    """Move a damaged last.pt away, where the one before it at `path` is gone on from: it must not replace that."""
    if path == previous_of(last) and last.exists():
        last.replace(last.with_name("last.aside.pt"))
