"""The section `federated:` of the configuration: who trains, how often they meet, how their updates become one model.

Imports neither torch nor Flower, so that a mistake in the YAML is answered at once. Next to read: `federated/`.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ml_src.core.transform_specs import Section

Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]


class FedAvg(Section):
    """The mean of the sites' weights, each weighing as much as its training images (McMahan et al. 2017)."""

    type: Literal["fedavg"] = "fedavg"


class FedProx(Section):
    """FedAvg; the loss of a site has a term that holds it near the global weights (Li et al. 2020)."""

    type: Literal["fedprox"]
    proximal_mu: Annotated[float, Field(ge=0)] = 0.01
    """mu of the term mu / 2 * |w - w_global|^2."""


class FedAvgM(Section):
    """FedAvg with momentum at the server (Hsu et al. 2019)."""

    type: Literal["fedavgm"]
    server_learning_rate: Rate = 1.0
    """Factor of a round's mean update."""
    server_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Share of the last round's step that is kept."""


class _Adaptive(Section):
    eta: Rate = 0.01
    """Learning rate of the server."""
    tau: Rate = 1e-3
    """Added to the denominator: how little the server adapts."""


class FedAdam(_Adaptive):
    """Adam at the server, on the sites' mean update (Reddi et al. 2021)."""

    type: Literal["fedadam"]
    beta_1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta_2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of the second moment."""


class FedYogi(_Adaptive):
    """Yogi at the server, on the sites' mean update (Reddi et al. 2021)."""

    type: Literal["fedyogi"]
    beta_1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta_2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of the second moment."""


class FedAdagrad(_Adaptive):
    """Adagrad at the server, on the sites' mean update (Reddi et al. 2021)."""

    type: Literal["fedadagrad"]


class FedMedian(Section):
    """The median of the sites' weights, each for itself (Yin et al. 2018): bears a wrong minority."""

    type: Literal["fedmedian"]


class FedTrimmedAvg(Section):
    """The mean of the sites' weights without the largest and smallest of each (Yin et al. 2018)."""

    type: Literal["fedtrimmedavg"]
    beta: Annotated[float, Field(gt=0, lt=0.5)] = 0.2
    """Share of the sites that is cut off at either end."""


class Krum(Section):
    """The one update that is nearest to its neighbours (Blanchard et al. 2017)."""

    type: Literal["krum"]
    num_malicious: Annotated[int, Field(ge=0)] | None = None
    """Sites that may send anything; as many as the updates of a round allow when left out."""


class MultiKrum(Section):
    """The mean of the updates that are nearest to their neighbours (Blanchard et al. 2017)."""

    type: Literal["multikrum"]
    num_malicious: Annotated[int, Field(ge=0)] | None = None
    """Sites that may send anything; as many as the updates of a round allow when left out."""
    num_selected: Positive = 2
    """Updates that are averaged."""


class Bulyan(Section):
    """A trimmed mean of Krum's best updates (El Mhamdi et al. 2018); needs 4 * num_malicious + 3 sites."""

    type: Literal["bulyan"]
    num_malicious: Annotated[int, Field(ge=0)] | None = None
    """Sites that may send anything; as many as the updates of a round allow when left out."""


Strategy = (
    FedAvg | FedProx | FedAvgM | FedAdam | FedYogi | FedAdagrad | FedMedian | FedTrimmedAvg | Krum | MultiKrum | Bulyan
)
# These look at single updates; all others need no more than their mean.
SELECTIVE = ("fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan")


def _by_name(raw: Any) -> Any:
    """A strategy without options may be its name alone."""
    return {"type": raw} if isinstance(raw, str) else raw


class CentralDP(Section):
    """Differential privacy for whole sites: the server clips each update and adds noise (McMahan et al. 2018)."""

    noise_multiplier: Rate = 1.0
    """Standard deviation of the noise over the clip norm."""
    clip_norm: Rate = 1.0
    """L2 norm to which each site's update is clipped."""
    target_epsilon: Rate | None = None
    """Budget: training ends before the round that would exceed it."""
    target_delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """Probability with which the guarantee may fail."""


class FederatedConfig(Section):
    """Only for trainer_type `federated`: several data holders train one model; images stay where they are."""

    sites: list[str] | None = None
    """The sites of a simulation: data folders, each with its own `splits/`, or folders of index files of data_dir, as
    `ml-split --federated` writes them. This or num_sites."""
    num_sites: Positive | None = None
    """Divide the data set into so many sites for a simulation."""
    partition: Literal["iid", "dirichlet", "by_group"] = "iid"
    """How num_sites divides: at random; by class, unevenly; or by the groups of ml-split, which stay whole."""
    alpha: Rate = 0.5
    """Only for `dirichlet`: how even the sites are in their classes; 0.1 is very uneven, 100 is even."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Draws the partition; the seed of the run when left out."""
    rounds: Positive = 10
    """How often the sites' updates become one model."""
    local_epochs: Positive | None = None
    """Epochs that a site trains in a round; 1 when local_steps is left out too."""
    local_steps: Positive | None = None
    """Instead: optimizer steps that a site takes in a round, however many images it has."""
    strategy: Annotated[Annotated[Strategy, Field(discriminator="type")], BeforeValidator(_by_name)] = FedAvg()
    """How updates become one model: a name, or a mapping with `type` and its options."""
    backend: Literal["standard", "mixed_precision", "dp"] = "standard"
    """How a step runs at a site; `dp` reads training.dp, each site has its own budget."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the sites that train in a round; all are measured, under secure_aggregation those that train."""
    min_sites: Positive | None = None
    """Sites without whose updates a round does not count; 2 (of one site 1) when left out."""
    round_timeout: Rate = 3600.0
    """Seconds after which a round goes on without the sites that have not answered."""
    personalize: Literal["none", "batch_norm"] = "none"
    """`batch_norm`: each site keeps its own batch normalisation (FedBN, Li et al. 2021)."""
    max_update_norm: Rate | None = None
    """Updates of a larger L2 norm are dropped; ten times the median of the round when left out."""
    secure_aggregation: bool = False
    """The server sees the sum of the updates only (Bonawitz et al. 2017); three sites at least."""
    central_dp: CentralDP | None = None
    """Noise on the mean update, at the server."""

    @property
    def quorum(self) -> int:
        """`min_sites`, or its default."""
        return self.min_sites or (1 if self.num_sites == 1 or (self.sites and len(self.sites) == 1) else 2)

    def num_chosen(self, num_sites: int) -> int:
        """Return how many of so many sites train in a round."""
        return min(max(round(self.fraction * num_sites), self.quorum), num_sites)
