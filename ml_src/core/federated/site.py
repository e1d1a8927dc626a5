"""One data holder of a federation: it runs the loop of any training, through any backend, round by round.

It knows its own configuration and data, and takes nothing but numbers from the server. Its optimizer, schedule and
random state stay with it; under FedBN it takes over no batch normalisation. Next to read: `rounds.py`, the other side.
"""

import hashlib
import json
import logging
import math
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ml_src.core.atomic import remove_leftovers
from ml_src.core.checkpoint import load_checkpoint, load_weights, random_state, save_checkpoint, set_random_state
from ml_src.core.config import Config
from ml_src.core.config_file import plain
from ml_src.core.data.files import read_class_names
from ml_src.core.device import choose_device
from ml_src.core.errors import BudgetError, DataError
from ml_src.core.federated.facts import collect, sections_of
from ml_src.core.federated.layout import Layout
from ml_src.core.federated.local_round import Proximal, RoundEnd
from ml_src.core.federated.secure_round import PHASES, Keys, Masking, Tally, require_enough
from ml_src.core.federated.site_state import BEST, ENDED, End, SiteState
from ml_src.core.federated.site_state import PERSONAL as PERSONAL
from ml_src.core.federated.wire import Expected, Letter, WireError
from ml_src.core.inference.measure import Measuring, compare_split
from ml_src.core.inference.predictor import Options
from ml_src.core.inference.torch_member import TorchMember, placed
from ml_src.core.losses.segmentation import balanced_weights
from ml_src.core.network import build_model
from ml_src.core.optim import Schedule
from ml_src.core.tasks import task_for
from ml_src.core.trainers import build_training, choose_backend
from ml_src.core.trainers.loop import evaluate, train_epoch
from ml_src.core.trainers.training import Progress, Training

LONGEST_NAME = 64  # of a session
LONGEST_WHY = 500  # characters
LONGEST_REASON = 500  # characters of why a federation was stopped
KEPT = 3  # states of rounds: one that may not count yet, and two of which the server may lose the last one
log = logging.getLogger("ml_src")


def site_seed(seed: int, index: int) -> int:
    """Return the seed of a site; the first one's is the run's, so that alone it trains as without a federation."""
    return seed if index == 0 else int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0] >> 1)


class Site:
    """Answers letters; what it has done is in its folder, so that it can be killed at any moment and go on."""

    def __init__(
        self,
        name: str,
        config: Config,
        folder: Path,
        index: int = 0,
        keep_workers: bool = True,
        keys: Keys | None = None,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        assert config.federated is not None
        self.name, self.folder, self.keep_workers, self.keys = name, folder, keep_workers, keys
        self.note = note  # takes lines for who runs the site
        self.program = 1 + secrets.randbelow(2**31 - 1)  # goes with all that it answers: two at once are found out
        self.federated, self.sections = config.federated, sections_of(config)
        self.config = config.model_copy(
            update={
                "federated": None,
                "training": config.training.model_copy(update={"trainer_type": config.federated.backend}),
                "seed": site_seed(config.seed, index),
            }
        )
        with torch.device("meta"):
            self.layout = Layout.of(build_model(config.model))
        (folder / "weights").mkdir(parents=True, exist_ok=True)
        for path in (folder, folder / "weights"):
            remove_leftovers(path)
        self.state = SiteState(folder / "site.json")
        self.seen = ""  # what it found of the weights that came last
        self.training: Training | None = None
        self.random: dict[str, Any] = {}  # the state of the generators, between two letters
        self.done = 0  # the round whose result `training` holds
        self.masking: Masking | None = None  # of the round that is being summed up

    @property
    def is_personal(self) -> bool:
        """Whether the site keeps its batch normalisation."""
        return self.federated.personalize == "batch_norm"

    def expected(self) -> dict[str, dict[str, Expected]]:
        """Return the arrays that each kind of letter must have."""
        weights = {kind: Expected("float32", (size,)) for kind, size in self.layout.sizes.items()}
        phases: dict[str, dict[str, Expected]] = {kind: {} for kind in PHASES}
        return {
            "facts": {},
            "settle": {},
            "out": {},
            "evaluate": weights,
            "train": weights,
            "measure": weights,
            "end": weights,
        } | phases

    def answer(self, letter: Letter) -> Letter:
        """Return the answer to a checked letter.

        Raises: TrainingError for one that is not due; MLError for what keeps the site from its work.
        """
        self._admit(letter)
        match letter.kind:
            case "facts":
                return letter.answer(values=self._facts(letter))
            case "settle":
                self._settle(letter.values)
                return letter.answer()
            case "train" | "evaluate":
                return self._work(letter)
            case "measure":
                return self._measure(letter)
            case "end":
                self._end(letter)
                return letter.answer()
            case "out":
                why = " ".join(str(letter.values.get("why")).split())[:LONGEST_WHY]
                self.note(f"this site takes no part, says the server: {why}")
                return letter.answer()
            case _:
                if self.masking is None:
                    raise WireError("no round is being summed up here: refused")
                told = self.masking.answer(letter)
                if letter.kind == "reveal":
                    self.state.reveal(letter.round, letter.values["survivors"])
                return told

    # Which letters are due.

    def _admit(self, letter: Letter) -> None:
        """Refuse what was said before, or is beyond what this site has agreed to."""
        state = self.state
        if (self.folder / ENDED).exists():
            raise WireError("this site was told that the federation has ended: refused")
        if letter.kind == "facts":
            if len(letter.session) > LONGEST_NAME:  # all of them are remembered
                raise WireError("the name of the session is too long: refused")
            if letter.session in state.sessions[:-1] or (letter.session == state.session and state.shared is not None):
                raise WireError(f"session {letter.session[:16]} has begun before: a replayed message is refused")
            return
        if not letter.session or letter.session != state.session:
            raise WireError(f"the message is of session {letter.session[:16]}, which is not under way: refused")
        if self.federated.secure_aggregation and letter.kind == "measure":
            raise WireError("secure aggregation hides the scores of single sites: refused")
        if (letter.kind == "settle" and state.shared is not None) or (letter.kind == "measure" and state.is_measured):
            raise WireError(f"{letter.kind} was answered before in this session: a replayed message is refused")
        if type(letter.values.get("best_round", 0)) is not int:
            raise WireError("the best round is no number: refused")
        if letter.kind in ("train", "evaluate", "measure", "end"):
            if state.shared is None:
                raise WireError("no round before the statistics of all sites are known: send settle first")
            if self.federated.secure_aggregation and letter.kind != "end":
                require_enough(letter)
            if letter.kind in ("train", "evaluate") and letter.round <= state.answered:
                raise WireError(f"round {letter.round} was answered before: a replayed message is refused")
            last = self.federated.rounds + (letter.kind == "evaluate")
            if not 1 <= letter.round <= last:
                raise WireError(f"round {letter.round} is beyond the {self.federated.rounds} of this site's kit")

    def _facts(self, letter: Letter) -> dict[str, Any]:
        """Open a session: check the data, and tell what may be told of it."""
        task_for(self.config).check_data()
        facts = collect(self.config, self.sections)
        self.state.open(letter.session)
        return facts.model_dump(mode="json")

    def _settle(self, shared: Mapping[str, Any]) -> None:
        """Take the statistics of all sites; they become part of this site's configuration."""
        channels, num_classes = self.config.model.in_channels, self.config.data.num_classes
        known = {"mean": channels, "std": channels, "class_counts": num_classes}
        for key, length in known.items():
            values = shared.get(key)
            numbers = isinstance(values, list) and all(type(v) in (int, float) and math.isfinite(v) for v in values)
            if values is not None and not (numbers and len(values) == length):
                raise WireError(f"{key} of all sites must be {length} numbers")
        if self.config.needs_statistics and (shared.get("mean") is None or min(shared.get("std") or [0]) <= 0):
            raise WireError("mean and std of all sites are needed, with std above 0")
        if self.config.loss.class_weights == "balanced" and min(shared.get("class_counts") or [-1]) < 0:
            raise WireError("class_counts of all sites are needed, none below 0")
        num_images = shared.get("num_images")
        if not isinstance(num_images, int) or num_images < 1:
            raise WireError("the number of all sites' images is missing")
        self.state.settle({key: shared.get(key) for key in known} | {"num_images": num_images})
        self.training = None

    def settled(self) -> Config:
        """Return the site's configuration with the statistics of all sites."""
        config, shared = self.config, self.state.shared
        if shared is None:
            raise DataError(f"{self.name} has taken no part since it was started: its images could not be read")
        if config.needs_statistics:
            config = config.with_statistics(shared["mean"], shared["std"])
        if config.loss.class_weights == "balanced":
            weights = balanced_weights(shared["class_counts"])
            config = config.model_copy(update={"loss": config.loss.model_copy(update={"class_weights": weights})})
        return config

    # Work.

    def _work(self, letter: Letter) -> Letter:
        started = time.monotonic()
        t = self._at(letter.round)
        set_random_state(self.random)  # several sites of a simulation share one process
        try:
            self.layout.load(t.network, letter.arrays, self._kept())
            arrays, values = self._measured(t) if letter.round > 1 else ({}, {})
            if self.is_personal and letter.round > 1:
                contents = t.checkpoint() | self._origin("personal", letter.round - 1)
                save_checkpoint(self._personal(letter.round - 1), contents)
                self._drop_personal(letter.values.get("best_round"), letter.round - 1)
            if letter.kind == "train":
                values |= self._train(t, letter)
                arrays |= self.layout.flatten(t.network)
        except BaseException:
            self.training = None  # half a round: the next one begins from the disk
            raise
        finally:
            self.random = random_state()
            if not self.keep_workers:
                t.train_loader.close()
                t.val_loader.close()
        if letter.kind == "train":
            if not self.ends.refusal or values["num_steps"]:
                self._save(letter.round)
            values |= self._privacy()
        else:  # what this site may have trained for this round in an earlier attempt does not count
            self._drop_from(letter.round)
        self.state.answer(letter.round)
        self._say(letter, values)
        if not self.federated.secure_aggregation:
            return letter.answer(arrays, values | {"seconds": time.monotonic() - started})
        before = self.state.summed.get(str(letter.round))
        self.masking = Masking(
            self.name, letter, self.state.shared or {}, self._tally(letter, arrays, values), self.keys, before
        )
        plain = {key: values[key] for key in ("backend", "privacy", "ended") if key in values}
        return self.masking.begin(letter, plain | {"seconds": time.monotonic() - started})

    def _say(self, letter: Letter, values: Mapping[str, Any]) -> None:
        """Note this site's own numbers."""
        rounds = self.federated.rounds
        if letter.round > 1:
            self.note(f"round {letter.round - 1}/{rounds}: {self.seen} on the validation images of this site")
        if num_steps := values.get("num_steps"):
            self.note(f"round {letter.round}/{rounds}: {num_steps} steps, train_loss {values['train_loss']:.4f}")

    def _measure(self, letter: Letter) -> Letter:
        """Measure weights on the validation and test images at their own size; what leaves is a matrix of counts."""
        config, path, device = self.settled(), self.keep_personal(letter.values.get("best_round")), self._device()
        network = build_model(config.model)
        if path is None:
            self.layout.load(network, letter.arrays)
        else:
            load_weights(network, load_checkpoint(path)["model_state_dict"], path)
        member = TorchMember(path=path or self.folder, config=config, network=placed(network, device), device=device)
        splits, num_classes = task_for(config).measured_splits(), config.data.num_classes
        options, steps = Options(batch_size=config.training.batch_size), config.inference.postprocess
        arrays = {
            split: compare_split([member], split, options, steps, Measuring()).matrix
            if split in splits
            else np.zeros((num_classes, num_classes), np.int64)
            for split in ("val", "test")
        }
        self.state.measure()
        return letter.answer(arrays)

    def _end(self, letter: Letter) -> None:
        """Keep the best weights of all, then the word that all is over: killed in between, it is told again."""
        num_rounds, best_round, stop = (letter.values.get(key) for key in ("num_rounds", "best_round", "stop"))
        if not (type(num_rounds) is int and type(best_round) is int and 1 <= best_round <= num_rounds == letter.round):
            raise WireError("the best round is none of those that were trained: refused")
        if not (isinstance(stop, str) and len(stop) <= LONGEST_REASON and stop.isprintable()):
            raise WireError("why the federation was stopped is no line of text: refused")
        config = self.settled()
        network = build_model(config.model)
        self.layout.load(network, letter.arrays)
        contents = _contents(network, config, best_round) | self._origin("global", best_round)
        save_checkpoint(self.folder / "weights" / BEST, contents)
        self.keep_personal(best_round)
        End(num_rounds, best_round, stop).write(self.folder)

    def _device(self) -> torch.device:
        return choose_device(self.config.training.device)

    def _personal(self, number: object) -> Path:
        """Where the network of this site is kept that was measured for round `number`."""
        return self.folder / "weights" / f"personal_{number}.pt"

    def _drop_personal(self, *kept: object) -> None:
        """Remove the networks of this site but for those of the rounds in `kept`."""
        for path in set((self.folder / "weights").glob("personal_*.pt")) - {self._personal(number) for number in kept}:
            path.unlink(missing_ok=True)

    def keep_personal(self, best_round: object) -> Path | None:
        """Return this site's own network of the best round, from now on its only one; None without FedBN."""
        path, kept = self._personal(best_round), self.folder / "weights" / PERSONAL
        if not self.is_personal:
            return None
        if path.exists():
            path.replace(kept)
            self._drop_personal()
        return kept if kept.exists() else None

    def _kept(self) -> Collection[str]:
        """Names of the weights that are this site's own, once it has trained."""
        return self.layout.of_batch_norm if self.is_personal and self.done else ()

    def _tally(self, letter: Letter, arrays: dict[str, Any], values: dict[str, Any]) -> Tally:
        """Return what this site adds to the sum, each part weighted by its share of all sites' images."""
        assert self.state.shared is not None
        total = self.state.shared["num_images"]
        share, part = values.get("num_images", 0) / total, values.get("num_val", 0) / total
        changes = [
            share * (arrays[kind].astype(np.float64) - letter.arrays[kind]) if kind in arrays else np.zeros(size)
            for kind, size in self.layout.sizes.items()
        ]
        counts = arrays.get("counts", np.zeros(self.config.data.num_classes**2, np.int64))
        whole = [values.get(key, 0) for key in ("num_val", "num_images", "num_steps")]
        losses = [share * values.get("train_loss", 0.0), part * values.get("val_loss", 0.0)]
        return Tally(np.concatenate(changes), np.array(losses), np.concatenate([counts, whole]).astype(np.int64))

    def _at(self, number: int) -> Training:
        """Return the training as it was left before round `number`: that in memory, or the newest one on the disk."""
        if self.training is None or self.done >= number:
            self.training, self.done, t = None, 0, self._built()
            for saved, path in sorted(self._saved(), reverse=True):
                if saved < number:
                    t.restore(load_checkpoint(path), path)
                    self.done = saved
                    break
            self.random = random_state()
            try:
                for callback in t.callbacks:
                    callback.on_start(t)
            except BudgetError as error:
                self.ends.refusal = str(error)
            self.training = t
        return self.training

    def _built(self) -> Training:
        """Build the training anew, as it is before the first round."""
        config = self.settled()
        task = task_for(config)
        num_steps = choose_backend(config).train_order(task).num_steps
        federated = self.federated
        self.num_steps = federated.local_steps or (federated.local_epochs or 1) * num_steps  # of a round
        num_epochs = -(-self.num_steps * federated.rounds // num_steps)
        training = config.training.model_copy(update={"num_epochs": num_epochs})
        config = config.model_copy(update={"training": training})
        backend = choose_backend(config)
        t = build_training(config, task_for(config), backend, self.folder)
        if federated.local_steps is not None:  # sites differ in the steps of an epoch: lengths are in rounds then
            for group, rate in zip(t.optimizer.param_groups, t.schedule.base_lrs, strict=True):
                group["lr"] = rate  # what the first schedule made of it is undone
            t.schedule = Schedule(config.scheduler, t.optimizer, self.num_steps, federated.rounds)
        self.ends = RoundEnd()
        t.callbacks = [one for one in t.callbacks if one.name == "privacy_budget"] + [self.ends]
        return t

    def _measured(self, t: Training) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the counts and the loss of the weights that came, on this site's validation images."""
        metric = t.task.metric()
        scores = evaluate(t, metric)
        self.seen = f"val_loss {scores['loss']:.4f}, val_iou {scores['iou']:.4f}"
        num_val = t.task.num_images("val")
        return {"counts": metric.counts.cpu().numpy()}, {"val_loss": scores["loss"], "num_val": num_val}

    def _train(self, t: Training, letter: Letter) -> dict[str, Any]:
        """Take the steps of a round; return what is told of them."""
        first, per_epoch = (letter.round - 1) * self.num_steps, t.train_loader.num_steps
        t.progress = Progress(first // per_epoch, first, first % per_epoch)
        t.schedule.load_state_dict(t.schedule.state_dict() | {"num_steps": first})
        t.backend.rekey(self._circumstances(t, letter))
        if self.ends.refusal:  # what it measures is still of use
            return {"num_images": 0, "num_steps": 0, "ended": f"takes part no longer: {self.ends.refusal}"}
        t.stop, self.ends.last_step = "", first + self.num_steps
        plain, near = t.criterion, getattr(self.federated.strategy, "proximal_mu", 0.0)
        t.criterion = Proximal(plain, t.network, near) if near else plain
        loss_sum, num_samples = 0.0, 0
        while t.progress.step < self.ends.last_step and not t.stop:
            scores = train_epoch(t)
            if t.progress.num_samples:  # a private step may have drawn nobody
                loss_sum += scores["loss"] * t.progress.num_samples
            num_samples += t.progress.num_samples
            whole = t.progress.epoch_step == per_epoch
            t.progress = Progress(t.progress.epoch + whole, t.progress.step, 0 if whole else t.progress.epoch_step)
        t.criterion = plain
        if t.stop != self.ends.reached:  # the budget of dp: what was trained so far still counts
            self.ends.refusal = t.stop
        return {
            "num_images": t.task.num_images("train"),
            "num_steps": t.progress.step - first,
            "train_loss": loss_sum / max(num_samples, 1),
            "backend": t.backend.metrics(),
        }

    def _circumstances(self, t: Training, letter: Letter) -> bytes:
        """Return what this round begins with: noise that repeats may do so only where all of it does."""
        digest = hashlib.sha256(f"{letter.round} {self.federated.model_dump_json()} {self.num_steps}".encode())
        digest.update(letter.arrays["parameters"].tobytes())
        for group in t.optimizer.param_groups:
            digest.update(f"{group['lr']}".encode())
        for state in t.optimizer.state_dict()["state"].values():
            for value in state.values():
                digest.update(value.cpu().numpy().tobytes() if isinstance(value, Tensor) else f"{value}".encode())
        return digest.digest()

    def _privacy(self) -> dict[str, Any]:
        """Return what training has cost in privacy, as this site's own privacy.json has it."""
        path = self.folder / "privacy.json"
        if not path.exists():
            return {}
        report = json.loads(path.read_text(encoding="utf-8"))
        return {"privacy": {key: value for key, value in report.items() if key != "replays"}}

    # The disk.

    def _save(self, number: int) -> None:
        """Keep what this site must remember of a round, before its weights leave it."""
        t = self.training
        assert t is not None
        contents = t.checkpoint() | self._origin("local", number)
        t.backend.before_save(self.folder)
        save_checkpoint(self.folder / "weights" / f"round_{number}.pt", contents)
        self.done = number
        of_before = sorted(saved for saved in self._saved() if saved[0] <= number)[-KEPT:]
        for saved in set(self._saved()) - set(of_before):  # later ones are of a round that is done again
            saved[1].unlink(missing_ok=True)

    def _origin(self, network: str, number: int) -> dict[str, Any]:
        """Return what goes into a checkpoint, so that it tells wherever it is copied to who trained it, in what round.

        `network` is a word of `deployment/federation.py`.
        """
        assert self.state.shared is not None
        others = () if self.keys is None else self.keys.others
        told = {
            "network": network,
            "site": self.name,
            "sites": {name: {} for name in sorted({self.name, *others})} if others else {},
            "num_images": self.state.shared["num_images"],
            "round": number,
            "config": self.federated.model_dump(mode="json"),
        }
        return {"federation": told}

    def _drop_from(self, number: int) -> None:
        for saved, path in self._saved():
            if saved >= number:
                path.unlink(missing_ok=True)

    def _saved(self) -> list[tuple[int, Path]]:
        found = (self.folder / "weights").glob("round_*.pt")
        return [(int(path.stem.removeprefix("round_")), path) for path in found if path.stem[6:].isdigit()]


def _contents(network: nn.Module, config: Config, number: int) -> dict[str, Any]:
    """Return the checkpoint of a network that was trained over all sites, of round `number`; no training goes on."""
    names = config.data.class_names or read_class_names(Path(config.data.data_dir))
    config = config.model_copy(update={"data": config.data.model_copy(update={"class_names": names})})
    return {
        "model_state_dict": network.state_dict(),
        "raw_state_dict": {},
        "optimizer_state_dict": {},
        "scheduler_state_dict": {},
        "config": plain(config),
        "class_names": list(config.class_names),
        "epoch": number,
        "step": 0,
        "epoch_step": 0,
        "metrics": {},
        "backend_state_dict": {},
        "callback_state_dicts": {},
        "batch_size": config.training.batch_size,
        "processes": [],
        "num_threads": torch.get_num_threads(),
        "seconds": 0.0,
    }
