"""What private training has cost so far, and what it may still cost. Next to read: `noise.py`, which adds the noise.

A ledger lists the mechanisms that touched the data; an accountant turns the list into epsilon. Every epsilon here is an
upper bound, and never below what was spent: where the tight accountant cannot compute one, the loose one answers.
"""

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.accountants.analysis import rdp as renyi
from opacus.accountants.analysis.prv import Domain

from ml_src.core.errors import BudgetError, ConfigError, TrainingError

Accountant = Literal["prv", "rdp"]
Unit = Literal["image", "patient", "site"]
History = tuple[tuple[float, float, int], ...]  # noise multiplier, sample rate and steps of each mechanism

# Opacus stops at 63, which triples epsilon where the noise is large
ORDERS = [1 + x / 10 for x in range(1, 100)] + list(range(11, 64)) + [64, 80, 96, 128, 192, 256, 384, 512, 768, 1024]
ALL_ORDERS = np.full(len(ORDERS), True)
OPACUS_ORDERS = np.isin(ORDERS, RDPAccountant.DEFAULT_ALPHAS)
LARGEST_PRV = 700.0  # exp(709) overflows inside Opacus: where rdp says 1451 it answers 706, without a word
SMALLEST_DELTA = 1e-12  # below it the rounding of the Fourier transform is no longer small
LARGEST_GRID = 2**20  # points; about one second
LARGEST_NOISE = 1e6

log = logging.getLogger("ml_src")


class Mechanism(NamedTuple):
    """Steps of the Poisson-subsampled Gaussian mechanism, all alike."""

    noise_multiplier: float
    """Standard deviation of the noise over the sensitivity; at least 0."""
    sample_rate: float
    """Probability with which a unit (an image, a patient) is in a step; 0 to 1."""
    steps: int
    max_grad_norm: float
    """Clip norm over all parameters; of adaptive clipping the first one. Told only: the noise scales with it."""


class Bound(NamedTuple):
    """An epsilon, the accountant that gave it, and why that is not the one that was asked for ("" where it is)."""

    epsilon: float
    accountant: Accountant
    why: str


class Ledger:
    """The mechanisms of a run in their order; equal neighbours are one entry."""

    def __init__(self, mechanisms: Iterable[Mechanism] = ()) -> None:
        self.mechanisms: list[Mechanism] = []
        self._said: set[str] = set()
        for mechanism in mechanisms:
            self.charge(*mechanism)

    def charge(self, noise_multiplier: float, sample_rate: float, steps: int, max_grad_norm: float) -> None:
        """Add steps. Charge before their result leaves the process.

        Raises: ValueError for what no mechanism can be.
        """
        new = Mechanism(float(noise_multiplier), float(sample_rate), int(steps), float(max_grad_norm))
        if not (0 <= new.noise_multiplier < math.inf and 0 <= new.sample_rate <= 1 and new.steps >= 0):
            raise ValueError(f"{new} is no mechanism")
        last = self.mechanisms[-1] if self.mechanisms else None
        if last is not None and last._replace(steps=0) == new._replace(steps=0):
            self.mechanisms[-1] = last._replace(steps=last.steps + new.steps)
        elif new.steps:
            self.mechanisms.append(new)

    @property
    def num_steps(self) -> int:
        """All steps charged."""
        return sum(mechanism.steps for mechanism in self.mechanisms)

    def bound(self, delta: float, accountant: Accountant) -> Bound:
        """Return the upper bound of epsilon at `delta`: 0 before the first step, inf where there was no noise.

        `rdp` converts Renyi divergences (Mironov et al. 2019; Balle et al. 2020). `prv` convolves privacy loss
        variables (Gopi et al. 2021) into a lower bound, an estimate and an upper bound, of which the last is taken; it
        is some 10 % lower than `rdp`, and is replaced by it beyond what it can compute.
        """
        return _bound(_history(self.mechanisms), delta, accountant)

    def epsilon(self, delta: float, accountant: Accountant) -> float:
        """Return `bound`'s epsilon; where another accountant had to answer, log why, once."""
        bound = self.bound(delta, accountant)
        if bound.why and bound.why not in self._said:
            log.warning("epsilon is that of the rdp accountant, an upper bound too: %s", bound.why)
            self._said.add(bound.why)
        return bound.epsilon

    def plus(self, noise_multiplier: float, sample_rate: float, steps: int) -> "Ledger":
        """Return a copy with more steps, for a question about the future."""
        ledger = Ledger(self.mechanisms)
        ledger.charge(noise_multiplier, sample_rate, steps, 1.0)
        return ledger

    def at_least(self, other: "Ledger") -> "Ledger":
        """Return the ledger of a run that is in both: of each mechanism, the larger number of steps.

        A checkpoint is a beginning of what its folder has charged since. Two resumes of it are two releases from the
        same images: the second goes on from the folder's ledger, so that both are paid.
        """
        merged = Ledger(self.mechanisms)
        mine, theirs = _total(self.mechanisms), _total(other.mechanisms)
        for kind, steps in theirs.items():
            missing = steps - mine.get(kind, 0)
            if missing > 0:
                merged.charge(kind.noise_multiplier, kind.sample_rate, missing, kind.max_grad_norm)
        return merged

    def plain(self) -> list[dict[str, Any]]:
        """Return the mechanisms as plain data, for a checkpoint or JSON."""
        return [mechanism._asdict() for mechanism in self.mechanisms]

    @classmethod
    def from_plain(cls, mechanisms: Sequence[dict[str, Any]]) -> "Ledger":
        """Return the ledger that `plain` wrote.

        Raises: KeyError, TypeError or ValueError where it did not.
        """
        return cls(Mechanism(**{key: raw[key] for key in Mechanism._fields}) for raw in mechanisms)


@dataclass(frozen=True)
class Plan:
    """What a run, or the rest of one, will do and cost."""

    noise_multiplier: float
    num_steps: int
    """Steps that may be taken: those wanted, or those that the budget allows."""
    wanted_steps: int
    epsilon: float
    """At the end of `num_steps`, what was spent before included."""
    delta: float
    accountant: Accountant
    """The one that gave epsilon."""
    why: str
    """Why that is not the one that was asked for; "" where it is."""
    unit: Unit

    def sentence(self, steps_per_epoch: int, first_step: int = 0) -> str:
        """Return what is told before the first step; a resumed run has taken `first_step` steps."""
        last, wanted = first_step + self.num_steps, first_step + self.wanted_steps
        epochs = -(-wanted // steps_per_epoch)
        accountant = f"{self.accountant}, because {self.why}" if self.why else self.accountant
        terms = f"delta {self.delta:g}, unit of privacy one {self.unit}, accountant {accountant}"
        noise = f"noise multiplier {self.noise_multiplier:.4g}"
        if math.isinf(self.epsilon):
            return f"Privacy: none: epsilon has no bound with {noise} ({wanted} steps; {terms})"
        if self.num_steps < self.wanted_steps:
            return (
                f"Privacy: the budget ends after step {last} of {wanted}, in epoch {-(-last // steps_per_epoch)} of "
                f"{epochs}, at epsilon {self.epsilon:.4g} with {noise} ({terms})"
            )
        return f"Privacy: epsilon {self.epsilon:.4g} after {wanted} steps, {epochs} epochs, with {noise} ({terms})"


def plan(
    noise_multiplier: float | None,
    target_epsilon: float | None,
    delta: float,
    sample_rate: float,
    num_steps: int,
    accountant: Accountant,
    spent: Ledger,
    unit: Unit = "image",
) -> Plan:
    """Decide how much noise is added, and how many of `num_steps` further steps are taken.

    Only the epsilon given: the noise that spends it, within 1 %, at the last step. Only the noise: every step. Both:
    the most steps that stay within epsilon. A resumed run gives the noise that it was started with, calibrated or not.
    Raises: ConfigError where neither is given or no noise reaches the epsilon; TrainingError where it is spent.
    """
    if noise_multiplier is None and target_epsilon is None:
        raise ConfigError("training.dp has neither noise_multiplier nor target_epsilon: give one, or both")

    def bound_at(by: Accountant, sigma: float, steps: int) -> Bound:
        return spent.plus(sigma, sample_rate, steps).bound(delta, by)

    def epsilon_at(by: Accountant, sigma: float, steps: int) -> float:
        return bound_at(by, sigma, steps).epsilon

    stages: list[Accountant] = ["rdp", "prv"] if accountant == "prv" else ["rdp"]  # prv starts where rdp, fast, ended
    sigma, allowed = noise_multiplier, num_steps
    if target_epsilon is not None and num_steps:
        already = spent.bound(delta, accountant).epsilon
        if already >= target_epsilon:
            raise BudgetError(
                f"the privacy budget is spent: epsilon {already:.4g} of training.dp.target_epsilon {target_epsilon:g}; "
                "stop here, or raise it"
            )
        if sigma is None:
            sigma = 1.0
            for by in stages:
                sigma = _calibrated(partial(epsilon_at, by, steps=num_steps), target_epsilon, sigma)
        allowed = 0
        for by in stages:
            allowed = _most_steps(partial(epsilon_at, by, sigma), target_epsilon, num_steps, allowed)
        if not allowed:
            error = TrainingError if spent.mechanisms else ConfigError
            first = epsilon_at(accountant, sigma, 1)
            raise error(
                f"the privacy budget allows no step: the next one brings epsilon to {first:.4g}, over "
                f"training.dp.target_epsilon {target_epsilon:g}; raise it, or noise_multiplier ({sigma:g})"
            )
    assert sigma is not None, "a run without steps has no noise to calibrate"
    bound = bound_at(accountant, sigma, allowed)
    return Plan(sigma, allowed, num_steps, bound.epsilon, delta, bound.accountant, bound.why, unit)


def read_privacy(path: Path) -> tuple[Ledger, dict[str, int]] | None:
    """Return ledger and replays (see `privacy_report`) of a run's privacy.json, None where there is no such file.

    Raises: TrainingError where it cannot be read: a lost ledger is not an empty one.
    """
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        return Ledger.from_plain(contents["mechanisms"]), {key: int(step) for key, step in contents["replays"].items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(
            f"{path} cannot be read ({error}), so what this run has spent is not known: "
            "restore the file, or start a new run with --run_name"
        ) from error


def privacy_report(
    ledger: Ledger,
    delta: float,
    accountant: Accountant,
    unit: Unit,
    not_covered: Sequence[str],
    replays: Mapping[str, int],
) -> dict[str, Any]:
    """Return the contents of privacy.json.

    `epsilon` is null where it has no bound (no noise was added: no privacy), for JSON knows no infinity. `accountant`
    is the one that gave it. `not_covered` are sentences: what was done with private images outside these mechanisms.
    `replays`: of each sequence of noise that can repeat to the bit, how many of its steps are paid; to take these again
    gives what was given before, and costs nothing.
    """
    bound = ledger.bound(delta, accountant)
    return {
        "epsilon": bound.epsilon if math.isfinite(bound.epsilon) else None,
        "delta": delta,
        "accountant": bound.accountant,
        "unit": unit,
        "mechanisms": ledger.plain(),
        "not_covered": list(not_covered),
        "replays": dict(replays),
    }


def _total(mechanisms: Iterable[Mechanism]) -> dict[Mechanism, int]:
    """Steps of each kind of mechanism; the keys have steps 0."""
    total: dict[Mechanism, int] = {}
    for mechanism in mechanisms:
        kind = mechanism._replace(steps=0)
        total[kind] = total.get(kind, 0) + mechanism.steps
    return total


def _history(mechanisms: Iterable[Mechanism]) -> History:
    """(noise multiplier, sample rate, steps) as Opacus wants them. Composition forgets the order, and the clip norm."""
    total: dict[tuple[float, float], int] = {}
    for sigma, rate, steps, _ in mechanisms:
        if rate > 0 and steps > 0:
            total[sigma, rate] = total.get((sigma, rate), 0) + steps
    return tuple((sigma, rate, steps) for (sigma, rate), steps in total.items())


@lru_cache(maxsize=256)  # an epoch asks for its epsilon several times: for the metrics, and for each file that tells it
def _bound(history: History, delta: float, accountant: Accountant) -> Bound:
    if not history:
        return Bound(0.0, accountant, "")
    if any(sigma == 0 for sigma, _, _ in history):
        return Bound(math.inf, accountant, "")
    with warnings.catch_warnings(), np.errstate(all="ignore"):  # of overflows on the way, which are looked for
        warnings.simplefilter("ignore")
        rdp = _rdp(history, delta)
        if accountant == "rdp":
            return Bound(rdp, "rdp", "")
        prv, why = _prv(history, delta, rdp)
    return Bound(prv, "prv", "") if not why else Bound(rdp, "rdp", why)


@lru_cache(maxsize=256)
def _curve(sigma: float, rate: float) -> NDArray[np.float64]:
    """The Renyi divergence of one step at each of ORDERS; that of more steps is its multiple."""
    curve: NDArray[np.float64] = renyi.compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=ORDERS)
    return curve


def _rdp(history: History, delta: float, used: NDArray[np.bool_] = ALL_ORDERS) -> float:
    curve = sum(steps * _curve(sigma, rate)[used] for sigma, rate, steps in history)
    return max(0.0, float(renyi.get_privacy_spent(orders=np.array(ORDERS)[used], rdp=curve, delta=delta)[0]))


class _PRV(PRVAccountant):  # type: ignore[misc]
    """Opacus' accountant with the same results. It spends nearly all its time on Renyi curves that are known here."""

    def _get_domain(
        self, prvs: Sequence[Any], num_self_compositions: Sequence[int], eps_error: float, delta_error: float
    ) -> Domain:
        num_steps = sum(num_self_compositions)
        whole, one = delta_error / 4, delta_error / (8 * num_steps)
        half = max(eps_error, _largest_loss(tuple(self.history), whole, one, OPACUS_ORDERS)) + 3
        return Domain.create_aligned(-half, half, eps_error / np.sqrt(num_steps * np.log(12 / delta_error) / 2))


def _largest_loss(history: History, whole: float, one: float, used: NDArray[np.bool_] = ALL_ORDERS) -> float:
    """Where a grid may end (Gopi et al. 2021, remark 5.6): epsilon of all steps at a delta, and of one at another."""
    return max(_rdp(history, whole, used), *(_rdp(((sigma, rate, 1),), one, used) for sigma, rate, _ in history))


def _prv(history: History, delta: float, rdp: float) -> tuple[float, str]:
    """The upper bound, and why it cannot be used. `rdp` tells beforehand how much the computation would take."""
    if delta < SMALLEST_DELTA:
        return math.nan, f"prv is not exact at a delta below {SMALLEST_DELTA:g}"
    num_steps = sum(steps for _, _, steps in history)
    half = 3 + _largest_loss(history, delta / 4000, delta / (8000 * num_steps))  # of the grid's length, as in Opacus
    if half > LARGEST_PRV:
        return math.nan, f"prv overflows where epsilon nears {LARGEST_PRV:g}"
    points_times_error = 2 * half * math.sqrt(num_steps * math.log(12_000 / delta) / 2)
    # Mesh and slack, which is added to epsilon: 0.3 % of it, or the finest that the largest grid can hold.
    error = max(min(0.01, 0.003 * rdp), points_times_error / LARGEST_GRID)
    accountant = _PRV()
    accountant.history = list(history)
    try:
        epsilon = float(accountant.get_epsilon(delta, eps_error=error)) if error < 1 else math.inf
    except (ArithmeticError, IndexError, RuntimeError, ValueError) as failure:
        return math.nan, f"prv failed ({failure})"
    if not epsilon <= rdp:  # NaN too
        return math.nan, "prv gives no lower bound here"
    return max(0.0, epsilon), ""


def _calibrated(epsilon_of: Callable[[float], float], target: float, start: float) -> float:
    """The least noise multiplier found with epsilon at most `target`: within 0.5 % of it, where epsilon has no jump."""
    high, factor = start, 1.1
    while (at_high := epsilon_of(high)) > target:
        if high > LARGEST_NOISE:
            raise ConfigError(
                f"training.dp.target_epsilon {target:g} is out of reach: even a noise_multiplier of {high:.3g} "
                f"spends {at_high:.4g}; raise it"
            )
        high, factor = high * factor, min(factor**2, 4)
    low, factor = high / 1.1, 1.1
    while at_high < 0.995 * target and (at_low := epsilon_of(low)) <= target:
        factor = min(factor**2, 4)
        high, at_high, low = low, at_low, low / factor
    by_line = False  # a line through both ends, in logarithms, is nearly right; halving in turn makes it end
    while at_high < 0.995 * target and high / low > 1.0001:
        line = math.log(at_low / (0.9975 * target)) / math.log(at_low / at_high) if math.isfinite(at_low) else 0.5
        share = 0.5 if by_line else min(max(line, 0.05), 0.95)
        by_line = not by_line
        middle = low * (high / low) ** share
        if (at_middle := epsilon_of(middle)) <= target:
            high, at_high = middle, at_middle
        else:
            low, at_low = middle, at_middle
    return high


def _most_steps(epsilon_of: Callable[[int], float], target: float, num_steps: int, low: int) -> int:
    """The largest number of steps, at most `num_steps`, with epsilon at most `target`; `low` is known to be one."""
    if epsilon_of(num_steps) <= target:
        return num_steps
    high = min(low + 1 + low // 2, num_steps)
    while high < num_steps and epsilon_of(high) <= target:
        low, high = high, min(high + 1 + high // 2, num_steps)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if epsilon_of(middle) <= target else (low, middle)
    return low
