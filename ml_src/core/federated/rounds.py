"""The server of a federation: round after round it sends the weights out and makes one model of what comes back.

It sees no image. A round is one message a site: the site measures the weights of the round before, then trains.
Next to read: `aggregation.py`, how updates become one; `journal.py`, what is on the disk when a round counts.
"""

import json
import logging
import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ml_src.core.atomic import write_json
from ml_src.core.config import Config
from ml_src.core.device import seed_everything
from ml_src.core.errors import ConfigError, TrainingError
from ml_src.core.federated.aggregation import Aggregator, Update, bears, norm, sound, too_few
from ml_src.core.federated.journal import Journal
from ml_src.core.federated.layout import Arrays, Layout
from ml_src.core.federated.link import MOST_WORDS, Answer, Link
from ml_src.core.federated.secure import SecureError
from ml_src.core.federated.secure_round import secure_sum
from ml_src.core.federated.session import Session
from ml_src.core.federated.wire import Expected, Letter
from ml_src.core.metrics.segmentation import Matrix
from ml_src.core.network import build_model
from ml_src.core.tasks import task_for

if TYPE_CHECKING:
    from ml_src.core.federated.central import CentralPrivacy

MOST_ATTEMPTS = 3  # of one round
MOST_NUMBERS = 20  # of a site's backend
MOST_PIXELS = 2**50  # of one pair of classes at one site
CHOICE = 7  # keeps the choice of sites apart from other random numbers of the same seed
log = logging.getLogger("ml_src")


class Federation:
    """One federated training, seen from the server."""

    def __init__(self, config: Config, link: Link, run_dir: Path, num_sites: int) -> None:
        assert config.federated is not None
        self.config, self.federated = config, config.federated
        seed_everything(config.seed, config.deterministic)
        self.network = build_model(config.model)  # as the first site builds it
        self.layout = Layout.of(self.network)
        self.weights = self.layout.flatten(self.network)
        self.aggregator = Aggregator(self.federated)
        self.num_chosen = self.federated.num_chosen(num_sites)
        self.privacy: CentralPrivacy | None = None
        if self.federated.central_dp is not None:
            from ml_src.core.federated import central  # takes two seconds to import

            self.privacy = central.CentralPrivacy(self.federated.central_dp, self.num_chosen)
        if problem := too_few(self.federated, self.num_chosen):
            raise ConfigError(problem)
        if self.privacy is not None and self.layout.buffers:
            raise ConfigError("federated.central_dp protects weights, not running statistics: use model.norm group")
        self.journal = Journal(config, run_dir)
        self.session = Session(config, link, self.journal, num_sites)
        self.round = 0
        self.ended: set[str] = set()  # sites whose privacy budget is spent

    def restore(self, contents: Mapping[str, Any]) -> None:
        """Go on from a checkpoint of the journal."""
        self.network.load_state_dict(contents["model_state_dict"])
        self.weights = self.layout.flatten(self.network)
        self.round = int(contents["epoch"])
        self.aggregator.load_state_dict(contents["backend_state_dict"]["aggregator"])
        if self.privacy is not None:
            self.privacy.load_state_dict(contents["backend_state_dict"]["privacy"])
            self.privacy.recover(self.journal.run_dir / "privacy.json")
        self.journal.restore(contents)

    def run(self) -> None:
        """Train until the last round, or until early stopping; then measure what came out."""
        last = self._last_round()
        strategy = self.federated.strategy
        if (wrong := bears(strategy, self.num_chosen)) is not None:
            log.info("%s: of %d sites in a round, %d may send anything", strategy.type, self.num_chosen, wrong)
        self.session.open(self.round)
        while self.round < last and not self.journal.stop:
            self.train_round(self.round + 1)
        self.measure_last()

    def _last_round(self) -> int:
        """The last round: that of the configuration, or of the budget; said before anything is trained."""
        wanted = self.federated.rounds - self.round
        if self.privacy is None or wanted <= 0:
            return self.federated.rounds
        try:
            log.info(self.privacy.sentence(wanted, self.round))
            return self.round + self.privacy.allowed_rounds(wanted)
        except TrainingError as error:
            if not self.round:
                raise
            log.info("Privacy: %s", error)  # what was trained before can still be measured
            return self.round

    # Rounds.

    def train_round(self, number: int) -> None:
        """Train round `number`, again where too few sites got through."""
        for _ in range(MOST_ATTEMPTS):
            started = time.monotonic()
            present = self.session.present(number)
            if self._is_spent(present):
                self.journal.stop = "the privacy budgets of the sites are spent"
                return
            chosen = self.choose(present, number)
            try:
                found = self._sums(number, chosen) if self._is_secure else self._updates(number, present, chosen)
                if self._is_spent(present):
                    self._enter(number - 1, found.scores)
                    self.journal.stop = "the privacy budgets of the sites are spent"
                    return
                self._require_enough(found)  # first, or a round that is tried again would be scored by a few, and twice
                self._enter(number - 1, found.scores)
                if self.journal.stop:
                    return
            except SecureError as error:
                log.warning("round %d: %s; trying again", number, error)
            else:
                self._commit(number, found, time.monotonic() - started)
                return
            self.session.open(number)
        if self._is_secure and not self.journal.is_skipped(number - 1):  # it may never be summed up again
            log.warning("round %d is passed over", number)
            self.round = number
            self.journal.skip(number, self._state())
            return
        raise TrainingError(f"round {number} failed {MOST_ATTEMPTS} times: see the lines above, then go on")

    def _is_spent(self, present: list[str]) -> bool:
        """Whether too few sites have a privacy budget left."""
        return bool(self.ended) and len(set(present) - self.ended) < self.session.needed

    @property
    def _is_private(self) -> bool:
        return self.federated.backend == "dp"

    @property
    def _is_secure(self) -> bool:
        return self.federated.secure_aggregation

    def choose(self, present: list[str], number: int) -> list[str]:
        """Return the sites that train in a round: a function of (seed, round) and of who is there."""
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.config.seed, CHOICE, number))))
        able = sorted(set(present) - self.ended)
        return sorted(rng.choice(able, min(self.num_chosen, len(able)), replace=False).tolist())

    def _require_enough(self, found: "Found") -> None:
        """Raise SecureError, so that the round is tried again, where too few updates came through."""
        if len(found.sites) < self.session.needed:
            raise SecureError(f"only {len(found.sites)} sound updates, {self.session.needed} are needed")

    def _end(self, site: str, letter: Letter) -> None:
        """Count on a site no longer: its privacy budget is spent."""
        self.ended.add(site)
        self.session.trouble(site, str(letter.values["ended"])[:MOST_WORDS])

    def _updates(self, number: int, present: list[str], chosen: list[str]) -> "Found":
        """Ask every site for its update or its scores, and return what can be used."""
        answers = self._wave(number, present, chosen)
        found = Found(
            privacy=_privacy(answers, self._is_private), scores=self._measured(answers) if number > 1 else None
        )
        self._write_privacy(found)  # what reached the server is paid, whatever becomes of the round
        for answer, letter in answers:
            if "ended" in letter.values:
                self._end(answer.site, letter)
            elif letter.kind == "train":
                update = Update(
                    answer.site,
                    self.session.num_images[answer.site],  # as told before round 1: nobody can make itself heavier
                    self.layout.named("parameters", letter.arrays["parameters"]),
                    self.layout.named("buffers", letter.arrays["buffers"]),
                )
                found.updates.append(update)
                found.sites[answer.site] = self._told(answer, letter, norm(self._named(), update))
        bound = math.inf if self.privacy is not None else self.federated.max_update_norm  # a bound of all tells of one
        found.updates, found.dropped = sound(self._named(), found.updates, bound)
        for site, why in found.dropped.items():
            log.warning("The update of %s is dropped: %s", site, why)
            del found.sites[site]
        return found

    def _wave(self, number: int, present: list[str], chosen: list[str]) -> list[tuple[Answer, Letter]]:
        """Send the weights to all; return the usable answers."""
        values = {"best_round": self.journal.best_round}
        letters = {
            kind: self.session.letter(kind, number, arrays=self.weights, values=values)
            for kind in ("train", "evaluate")
        }
        asked = {site: letters["train" if site in chosen else "evaluate"] for site in present}
        if number == 1:  # the weights before it are those that chance gave: nobody measures them
            asked = {site: letter for site, letter in asked.items() if site in chosen}
        counts = {"counts": Expected("int64", (self.config.data.num_classes**2,))} if number > 1 else {}
        weights = {kind: Expected("float32", (size,)) for kind, size in self.layout.sizes.items()}
        return self.session.ask(asked, {"train": counts | weights, "evaluate": counts})

    def _sums(self, number: int, chosen: list[str], kind: str = "train") -> "Found":
        """Ask the chosen sites, and learn no more than the sum of what they have."""
        values = {"num_sites": len(chosen), "best_round": self.journal.best_round}
        letter = self.session.letter(kind, number, arrays=self.weights, values=values)
        answers, opened = self.session.ask(dict.fromkeys(chosen, letter), {kind: {}}), []
        found = Found(privacy=_privacy(answers, self._is_private))
        self._write_privacy(found)  # what reached the server is paid, whatever becomes of the sum
        for answer, one in answers:
            if "ended" in one.values:  # it would add nothing, and so the sum be that of fewer
                self._end(answer.site, one)
            else:
                opened.append((answer, one))
        sizes, num_classes = self.layout.sizes, self.config.data.num_classes
        num_values, num_counts, least = sum(sizes.values()), num_classes**2 + 3, self.session.needed
        about = letter, self.session.shared
        tally, survivors = secure_sum(self.session.ask, *about, opened, least, num_values, num_counts)
        num_val, num_images, _ = tally.counts[-3:].tolist()
        total = self.session.total_images
        found.num_images = num_images
        if number > 1:
            loss = float(tally.losses[1]) * total / max(num_val, 1)
            found.scores = Scores(self._scores(tally.counts[:-3]) | {"loss": loss}, {})
        found.sites = {a.site: self._told(a, one, None) for a, one in opened if a.site in survivors}
        if num_images:
            mean = tally.change * total / num_images
            found.change = {"parameters": mean[: sizes["parameters"]], "buffers": mean[sizes["parameters"] :]}
            found.train_loss = float(tally.losses[0]) * total / num_images
        return found

    def _told(self, answer: Answer, letter: Letter, length: float | None) -> dict[str, Any]:
        """What federation.json has of a site's round; what secure aggregation hides is None."""
        values, sent = letter.values, sum(array.nbytes for array in self.weights.values())
        return {
            "num_images": self.session.num_images[answer.site],
            "num_steps": _number(values, "num_steps"),
            "train_loss": _number(values, "train_loss"),
            "norm": length,
            "bytes_down": sent,
            "bytes_up": answer.num_bytes,
            "work_seconds": _number(values, "seconds"),
            "seconds": answer.seconds,
            "backend": _numbers(values.get("backend")),
        }

    def _named(self) -> tuple[Arrays, Arrays]:
        return (
            self.layout.named("parameters", self.weights["parameters"]),
            self.layout.named("buffers", self.weights["buffers"]),
        )

    def _commit(self, number: int, found: "Found", seconds: float) -> None:
        """Make one model of the updates; from here on the round counts."""
        before = self._named()
        total = found.num_images or sum(update.num_images for update in found.updates)
        if self.privacy is not None:
            parameters = self.privacy.release(before[0], found.updates)
            self._write_privacy(found)
            after = self.aggregator.combine_mean(number, before, parameters, {}, total)
        elif found.change is not None:
            mean = {kind: (self.weights[kind] + change).astype(np.float32) for kind, change in found.change.items()}
            named = [self.layout.named(kind, mean[kind]) for kind in ("parameters", "buffers")]
            after = self.aggregator.combine_mean(number, before, named[0], named[1], total)
        else:
            after = self.aggregator.combine(number, before, found.updates)
        self.weights = {
            "parameters": self.layout.joined("parameters", after[0]),
            "buffers": self.layout.joined("buffers", after[1]),
        }
        self.layout.load(self.network, self.weights)
        self.round = number
        told = [one for one in found.sites.values() if one["train_loss"] is not None]
        weight = sum(one["num_images"] for one in told)
        train_loss = sum(one["train_loss"] * one["num_images"] for one in told) / weight if weight else None
        entry = {
            "round": number,
            "seconds": seconds,
            "train_loss": train_loss if found.train_loss is None else found.train_loss,
            "sites": found.sites,
            "dropped": found.dropped,
        }
        if self.privacy is not None:
            entry["epsilon"] = self.privacy.epsilon()
        if (wrong := bears(self.federated.strategy, len(found.updates))) is not None:
            entry["num_malicious"] = wrong
            if wrong < (bears(self.federated.strategy, self.num_chosen) or 0):
                log.warning("round %d: of its %d updates, only %d may be anything", number, len(found.updates), wrong)
        self.journal.commit(entry, self._state())

    def _write_privacy(self, found: "Found") -> None:
        """Write what this run has cost, of whole sites and at each of them, before its weights are written."""
        if self.privacy is None and not found.privacy:
            return
        path = self.journal.run_dir / "privacy.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        sites = before.get("sites", {}) | found.privacy
        epsilons = [report["epsilon"] for report in sites.values()]
        of_sites = {
            "unit": "an image, or a patient, of one site: what it has spent over all rounds is under sites",
            "epsilon": None if None in epsilons else max(epsilons, default=0.0),  # null: no bound
        }
        write_json(path, (of_sites if self.privacy is None else self.privacy.report()) | {"sites": sites})

    def _state(self) -> dict[str, Any]:
        """The server's own part of a checkpoint."""
        state = {"model_state_dict": self.network.state_dict(), "aggregator": self.aggregator.state_dict()}
        return state if self.privacy is None else state | {"privacy": self.privacy.state_dict()}

    # Scores.

    def _measured(self, answers: list[tuple[Answer, Letter]]) -> "Scores | None":
        """Return what the sites found of the weights that they were sent; None where no one has answered."""
        if not answers:
            return None
        scores = {}
        total = np.zeros(self.config.data.num_classes**2, np.int64)
        loss_sum = num_val = 0.0
        for answer, letter in answers:
            counts = letter.arrays["counts"]
            if counts.min() < 0 or counts.max() > MOST_PIXELS:
                self.session.trouble(answer.site, "sent counts of pixels that cannot be: its scores are left out")
                continue
            loss, images = _number(letter.values, "val_loss"), _number(letter.values, "num_val")
            loss = math.nan if loss is None else loss  # of all too: weights that diverged must not seem to be the best
            scores[answer.site] = self._scores(counts) | {"loss": loss}
            loss_sum, num_val = loss_sum + loss * (images or 0.0), num_val + (images or 0.0)
            total += counts
        return Scores(self._scores(total) | {"loss": loss_sum / max(num_val, 1)}, scores)

    def _enter(self, number: int, scores: "Scores | None") -> None:
        """Enter the scores of the weights of round `number`."""
        if scores is not None:
            self.journal.measured(number, scores.total, scores.sites, self._state())

    def _scores(self, counts: NDArray[np.int64]) -> dict[str, float]:
        metric = task_for(self.config).metric()
        metric.counts = torch.from_numpy(counts)
        return metric.compute()

    def measure_last(self) -> None:
        """Let all sites measure the weights of the last round."""
        if not self.journal.is_measured(self.round):
            present, scores = self.session.here(), None
            try:
                if self._is_secure:
                    scores = self._sums(self.round + 1, present, "evaluate").scores
                else:
                    scores = self._measured(self._wave(self.round + 1, present, []))
            except SecureError as error:
                log.warning("the last round is not measured: %s", error)
            self._enter(self.round, scores)
        self.journal.keep_some(self.round, self._state())
        self.journal.save(self._state())

    def measure(self, state_dict: Mapping[str, Any]) -> dict[str, tuple[Matrix, dict[str, Matrix]]]:
        """Let the sites measure weights on their validation and test images, at the images' own size.

        Returns the confusion matrix over all, (classes, classes), and that of each site: by `val` and `test`. Under
        secure aggregation, which hides the matrices of single sites, there is none.
        """
        self.network.load_state_dict(state_dict)
        present = self.session.here()
        if self._is_secure or not present:
            return {}
        num_classes = self.config.data.num_classes
        values = {"best_round": self.journal.best_round}
        letter = self.session.letter("measure", self.round, arrays=self.layout.flatten(self.network), values=values)
        matrix = Expected("int64", (num_classes, num_classes))
        told = self.session.ask(dict.fromkeys(present, letter), {"measure": {"val": matrix, "test": matrix}})
        found = {}
        for split in ("val", "test"):
            of_sites = {answer.site: one.arrays[split] for answer, one in told if one.arrays[split].any()}
            if of_sites:
                found[split] = (np.sum(list(of_sites.values()), axis=0), of_sites)
        return found

    def tell_end(self, best: Mapping[str, Any], sites: Collection[str]) -> list[str]:
        """Send the best checkpoint's weights to some sites, with the word that all is over; return who has them now."""
        self.network.load_state_dict(best["model_state_dict"])
        values = {"best_round": best["epoch"], "num_rounds": self.round, "stop": self.journal.stop}
        letter = self.session.letter("end", self.round, arrays=self.layout.flatten(self.network), values=values)
        told = self.session.ask(dict.fromkeys(sites, letter), {"end": {}}) if sites else []
        self.journal.write()  # with what went wrong since the last round
        return [answer.site for answer, _ in told]


@dataclass(frozen=True)
class Scores:
    """Of the weights of a round, over the validation images of all sites together, and of each site."""

    total: dict[str, float]
    sites: dict[str, dict[str, float]]


@dataclass
class Found:
    """What a round brought: updates, or under secure aggregation their mean change alone."""

    updates: list[Update] = field(default_factory=list)
    sites: dict[str, dict[str, Any]] = field(default_factory=dict)  # whose updates are used
    dropped: dict[str, str] = field(default_factory=dict)
    privacy: dict[str, dict[str, Any]] = field(default_factory=dict)  # the ledger of each site that trained under dp
    num_images: int = 0
    change: dict[str, NDArray[np.float64]] | None = None
    train_loss: float | None = None
    scores: Scores | None = None  # of the weights that the round began with


def _privacy(answers: list[tuple[Answer, Letter]], is_private: bool) -> dict[str, dict[str, Any]]:
    """Return what each site tells of its ledger; of one that tells none, that there is no bound."""
    found = {}
    for answer, letter in answers if is_private else []:
        report = letter.values.get("privacy")
        known = report if isinstance(report, dict) else {}
        if letter.kind == "train" and ("ended" not in letter.values or known):
            found[answer.site] = {**known, "epsilon": _number(known, "epsilon")}
    return found


def _numbers(values: object) -> dict[str, float]:
    """Return the numbers among what a site's backend tells of itself."""
    known = values if isinstance(values, dict) else {}
    names = [name for name in list(known)[:MOST_NUMBERS] if isinstance(name, str) and len(name) < MOST_WORDS]
    return {name: number for name in names if (number := _number(known, name)) is not None}


def _number(values: Mapping[str, Any], key: str) -> float | None:
    """A number that a site tells; None where it is none, or so large that it cannot be reckoned with."""
    value = values.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18 else None
