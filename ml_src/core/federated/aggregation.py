"""How the updates of the sites become one model: which of them are used, and Flower's strategies on those.

The strategies are Flower's classes as they are; here is what they are given, and what is made of their answer. Next to
read: `central.py`, where noise is added; `rounds.py`, which asks for both.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import ml_src.core.federated.flower  # noqa: F401  # before flwr

# isort: split
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp import strategy as strategies
from ml_src.core.errors import CheckpointError, TrainingError
from ml_src.core.federated.layout import Arrays
from ml_src.core.federated_specs import (
    SELECTIVE,
    Bulyan,
    FedAvg,
    FederatedConfig,
    FedMedian,
    FedTrimmedAvg,
    Krum,
    MultiKrum,
    Strategy,
)

STRATEGIES: dict[str, Callable[..., strategies.FedAvg]] = {
    "fedavg": strategies.FedAvg,
    "fedprox": strategies.FedProx,
    "fedavgm": strategies.FedAvgM,
    "fedadam": strategies.FedAdam,
    "fedyogi": strategies.FedYogi,
    "fedadagrad": strategies.FedAdagrad,
    "fedmedian": strategies.FedMedian,
    "fedtrimmedavg": strategies.FedTrimmedAvg,
    "krum": strategies.Krum,
    "multikrum": strategies.MultiKrum,
    "bulyan": strategies.Bulyan,
}
OPTIONS = {"num_malicious": "num_malicious_nodes", "num_selected": "num_nodes_to_select"}  # ours: Flower's
# These are given how far each site has come in the round (weights after minus weights before) and answer a step; all
# others are given weights. The optimizers subtract the weights before the round from a mean that is rounded to float32:
# a layer that no site has changed would drift, for the rounding of its mean is taken for an update. Krum and its kin
# compute squared distances as norms minus dot products: among weights that agree in five digits nothing is left of
# them, and the site chosen is an accident. Neither depends on where the origin lies. A mean, a median and a trimmed
# mean do not subtract: given weights, one update or the middle one comes back to the bit.
BY_CHANGE = ("fedavgm", "fedadam", "fedyogi", "fedadagrad", "krum", "multikrum", "bulyan")
STATE = ("momentum_vector", "m_t", "v_t")  # what Flower's classes keep from round to round
REMEDIES: dict[str, tuple[str, float]] = {  # option -> what to do with it, and the value that needs the fewest sites
    "num_malicious": ("lower", 0),
    "num_selected": ("lower", 1),
    "beta": ("raise", 0.499),  # it is less than 0.5
}
OUTLIER = 10.0  # times the median norm of a round
ENOUGH = 3  # updates that a median can judge


@dataclass(frozen=True)
class Update:
    """What a site sends after its share of a round."""

    site: str
    num_images: int
    """Training images of the site: how much it weighs."""
    parameters: Arrays
    """Its weights after training, not what has changed."""
    buffers: Arrays
    """Its running statistics of batch normalisation."""


class Aggregator:
    """One of Flower's strategies, and what it remembers."""

    def __init__(self, config: FederatedConfig) -> None:
        self.config = config
        self.kind = config.strategy.type
        self.strategy = _build(config.strategy)
        # Means and variances never pass through the server's optimizer: a variance that overshoots is negative.
        self.of_buffers = _build(FedMedian(type="fedmedian") if self.kind in SELECTIVE else FedAvg())

    def combine(self, round: int, before: tuple[Arrays, Arrays], updates: Sequence[Update]) -> tuple[Arrays, Arrays]:
        """Return the parameters and the buffers after a round: float32, names and shapes as before.

        Args:
            round: 1 for the first; Adam's first steps depend on it.
            before: parameters and buffers that the round began with.
            updates: sound ones, each of another site; their order changes nothing.

        Raises: TrainingError where there are fewer than the strategy needs, or where it diverges.
        """
        least = least_sites(self.config)
        if len(updates) < least:
            raise TrainingError(
                f"round {round}: federated.strategy {self.kind} needs the updates of {least} sites and has "
                f"{len(updates)}: bring the other sites back, or choose another strategy"
            )
        if (wrong := bears(self.config.strategy, len(updates))) is not None:
            self.strategy.num_malicious_nodes = wrong
        updates = sorted(updates, key=lambda update: update.site)
        # How many images a site has is its own word: robust strategies do not take it.
        shares = [1 if self.kind in SELECTIVE else update.num_images for update in updates]
        combined = (
            self._combine_parameters(round, before[0], [update.parameters for update in updates], shares),
            _ask(self.of_buffers, round, before[1], [update.buffers for update in updates], shares),
        )
        return _as_float32(self.kind, round, combined[0]), _as_float32(self.kind, round, combined[1])

    def combine_mean(
        self,
        round: int,
        before: tuple[Arrays, Arrays],
        mean_parameters: Arrays,
        mean_buffers: Arrays,
        num_images: int,
    ) -> tuple[Arrays, Arrays]:
        """Return what `combine` does where only the mean of the updates is known, over `num_images` images.

        Raises: ValueError for a strategy that looks at single updates; TrainingError as `combine`.
        """
        if self.kind in SELECTIVE:
            raise ValueError(f"{self.kind} cannot work with a mean")
        return self.combine(round, before, [Update("all", num_images, mean_parameters, mean_buffers)])

    def _combine_parameters(
        self, round: int, before: Arrays, sent: Sequence[Arrays], shares: Sequence[int]
    ) -> dict[str, NDArray[Any]]:
        if self.kind not in BY_CHANGE:
            return _ask(self.strategy, round, before, sent, shares)
        origin = {name: np.zeros_like(values) for name, values in before.items()}
        changes = [{name: np.asarray(arrays[name] - before[name]) for name in before} for arrays in sent]
        step = _ask(self.strategy, round, origin, changes, shares)
        return {name: before[name] + step[name] for name in before}

    def state_dict(self) -> dict[str, Any]:
        """Return what the strategy remembers, as tensors and plain data."""
        kept = {name: _to_tensors(getattr(self.strategy, name)) for name in STATE if hasattr(self.strategy, name)}
        return {"strategy": self.kind, "kept": kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises: CheckpointError where another strategy did.
        """
        if state["strategy"] != self.kind:
            raise CheckpointError(
                f"federated.strategy is {self.kind}, but this checkpoint was made with {state['strategy']}: "
                "set it back, or start a new run with --run_name"
            )
        for name, values in state["kept"].items():
            setattr(self.strategy, name, _to_arrays(values))


def least_sites(config: FederatedConfig) -> int:
    """Return how many updates the strategy needs to keep what it promises.

    Flower goes on with fewer: its krum lets two sites that send the same win over honest ones, its trimmed mean cuts
    nobody off, and the median of two is their mean.
    """
    match config.strategy:
        case FedMedian():
            return 3
        case FedTrimmedAvg(beta=beta):
            least = math.ceil(1 / beta)
            return least + (int(beta * least) < 1)  # 49 * (1 / 49) < 1
        case Krum(num_malicious=wrong):
            return 2 * (wrong or 0) + 3  # Blanchard et al. 2017, proposition 2: 2 f + 2 < n
        case MultiKrum(num_malicious=wrong, num_selected=selected):
            return max(2 * (wrong or 0) + 3, (wrong or 0) + selected)  # so many right ones there must be
        case Bulyan(num_malicious=wrong):
            return 4 * (wrong or 0) + 3  # El Mhamdi et al. 2018, section 4
        case _:
            return 1


def too_few(config: FederatedConfig, num_sites: int) -> str:
    """Return what to do where so many sites in a round are fewer than the strategy needs, in a sentence; else ""."""
    least = least_sites(config)
    if num_sites >= least:
        return ""
    ways = []
    for option, (verb, easiest) in REMEDIES.items():
        if hasattr(config.strategy, option):
            strategy = config.strategy.model_copy(update={option: easiest})
            if least_sites(config.model_copy(update={"strategy": strategy})) <= num_sites:
                ways.append(f"{verb} {option}, ")
    return (
        f"federated.strategy {config.strategy.type} needs {least} sites in a round, and there are {num_sites}: "
        f"{''.join(ways)}{'or ' if ways else ''}choose another one"
    )


def bears(strategy: Strategy, num_updates: int) -> int | None:
    """Return how many of so many updates may be anything: num_malicious; where that is left out, the most there can be.

    None for strategies that are not told.
    """
    match strategy:
        case Krum(num_malicious=None):
            most = (num_updates - 3) // 2
        case MultiKrum(num_malicious=None, num_selected=selected):
            most = min((num_updates - 3) // 2, num_updates - selected)
        case Bulyan(num_malicious=None):
            most = (num_updates - 3) // 4
        case Krum(num_malicious=told) | MultiKrum(num_malicious=told) | Bulyan(num_malicious=told):
            return told
        case _:
            return None
    return max(0, most)


def norm(before: tuple[Arrays, Arrays], update: Update) -> float:
    """Return the L2 norm of what a site has changed in all parameters together, computed in float64."""
    return math.sqrt(sum(_squares(update.parameters[name], values) for name, values in before[0].items()))


def sound(
    before: tuple[Arrays, Arrays], updates: Sequence[Update], max_update_norm: float | None
) -> tuple[list[Update], dict[str, str]]:
    """Return the updates that can be used, and for each other site why its own cannot, in a sentence.

    Args:
        before: parameters and buffers that the round began with.
        updates: as they came, each of another site.
        max_update_norm: largest norm of an update; None is ten times the median of this round's, of three at least.
            The median makes the fate of one update depend on the others: where single sites are protected by noise
            (`central.py`) a number must be given, infinity for instance.
    """
    dropped = {update.site: fault for update in updates if (fault := _fault(before, update))}
    norms = {update.site: norm(before, update) for update in updates if update.site not in dropped}
    bound, rule = _bound(list(norms.values()), max_update_norm)
    for site, length in norms.items():
        if length > bound:
            dropped[site] = (
                f"its L2 norm {length:.4g} is over {bound:.4g}, which is {rule}: "
                "look at the data and the learning rate of the site, or set federated.max_update_norm higher"
            )
    return [update for update in updates if update.site not in dropped], dropped


def _bound(norms: Sequence[float], max_update_norm: float | None) -> tuple[float, str]:
    """The largest norm that is used, and what it is called."""
    if max_update_norm is not None:
        return max_update_norm, "federated.max_update_norm"
    median = float(np.median(norms)) if len(norms) >= ENOUGH else 0.0
    # where half of the sites have not moved, none has moved too far
    return OUTLIER * median or math.inf, f"{OUTLIER:g} times the median of this round"


def _fault(before: tuple[Arrays, Arrays], update: Update) -> str | None:
    """What is wrong with an update by itself."""
    if update.num_images < 1:
        return f"it comes from {update.num_images} images, as the site says: there must be one at least"
    for kind, expected, sent in zip(
        ("parameters", "buffers"), before, (update.parameters, update.buffers), strict=True
    ):
        if set(sent) != set(expected):
            names = ", ".join(sorted(set(sent) ^ set(expected))[:5])
            return f"it has other {kind} than the model ({names}): give the site the same model"
        for name, values in expected.items():
            if (sent[name].dtype, sent[name].shape) != (values.dtype, values.shape):
                return (
                    f"{name} is {sent[name].dtype} {sent[name].shape}, not {values.dtype} {values.shape}: "
                    "give the site the same model"
                )
            if not np.isfinite(sent[name]).all():
                return (
                    f"{name} has values that are no finite number: training at the site diverged, "
                    "so lower the learning rate"
                )
    return None


def _squares(after: NDArray[np.float32], before: NDArray[np.float32]) -> float:
    """Squared norm of the difference; NumPy's own sum does not depend on the number of threads, BLAS' does."""
    change = np.subtract(after, before, dtype=np.float64)
    return float(np.square(change).sum())


class _Nobody:
    """Stands for Flower's Grid: who trains is decided elsewhere. Among no nodes Flower draws nothing at random."""

    def get_node_ids(self) -> Iterable[int]:
        return []


@dataclass(frozen=True)
class _Reply:
    """What the strategies ask of a Message; a real one wants nodes and an identity of this process."""

    content: RecordDict

    def has_error(self) -> bool:
        return False


def _build(strategy: Strategy) -> strategies.FedAvg:
    options = strategy.model_dump(exclude={"type"}, exclude_none=True)
    named = {OPTIONS.get(name, name): value for name, value in options.items()}
    return STRATEGIES[strategy.type](min_train_nodes=0, min_available_nodes=0, **named)


def _ask(
    strategy: strategies.FedAvg, round: int, current: Arrays, sent: Sequence[Arrays], shares: Sequence[int]
) -> dict[str, NDArray[Any]]:
    """Have a strategy combine arrays; names in the order of `current`, for some go by position."""
    if not current:
        return {}
    if hasattr(strategy, "current_arrays"):
        strategy.current_arrays = None  # else FedAvgM goes on from its own last answer
    strategy.configure_train(round, _record(current), ConfigRecord(), _Nobody())
    replies = [
        _Reply(
            RecordDict(
                {
                    strategy.arrayrecord_key: _record({name: arrays[name] for name in current}),
                    "metrics": MetricRecord({strategy.weighted_by_key: share}),
                }
            )
        )
        for arrays, share in zip(sent, shares, strict=True)
    ]
    combined, _ = strategy.aggregate_train(round, replies)
    return {name: combined[name].numpy() for name in current}


def _record(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord({name: Array(values) for name, values in arrays.items()})


def _as_float32(kind: str, round: int, arrays: Mapping[str, NDArray[Any]]) -> Arrays:
    """Round to float32: Flower's Adam answers in float64."""
    with np.errstate(over="ignore"):  # looked for below
        rounded = {name: np.asarray(values, np.float32) for name, values in arrays.items()}
    if not all(np.isfinite(values).all() for values in rounded.values()):
        raise TrainingError(
            f"round {round}: the weights that federated.strategy {kind} makes are no finite numbers: "
            "lower its learning rate at the server, or that of the sites"
        )
    return rounded


def _to_tensors(kept: Any) -> Any:
    """Copy what a strategy keeps (arrays by name, arrays in a list, nothing yet) into tensors."""
    if isinstance(kept, Mapping):
        return {name: torch.from_numpy(np.array(values)) for name, values in kept.items()}
    return None if kept is None else [torch.from_numpy(np.array(values)) for values in kept]


def _to_arrays(kept: Any) -> Any:
    """Undo `_to_tensors`."""
    if isinstance(kept, Mapping):
        return {name: tensor.numpy().copy() for name, tensor in kept.items()}
    return None if kept is None else [tensor.numpy().copy() for tensor in kept]
