"""What a run folder tells of a checkpoint: its scores and what its privacy has cost. Next to read: `card.py`.

Nothing of it is needed to export. What is missing is left out; what is damaged is left out and said. Scores are taken
only where they are known to be of these very weights.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ml_src.core.checking.output_folder import digest_of
from ml_src.core.deployment.federation import Federation

SPLITS = ("val", "test")
Share = Annotated[float, Field(ge=0, le=1)]
Distance = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Ends = tuple[float, float]
MAPPING: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])
T = TypeVar("T")


class _Facts(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class Outlines(_Facts):
    """Means over images and classes; None where no outline was compared."""

    tolerance: float
    pixel_size: float
    hd95: Distance | None = None
    surface_dice: Share | None = None
    boundary_iou: Share | None = None


class Intervals(_Facts):
    """Ends of 95 % intervals by bootstrap; None where there is none."""

    over: str
    """What was drawn: images or groups."""
    num: Count
    one_group: bool = False
    iou: Ends | None = None
    dice: Ends | None = None
    pixel_accuracy: Ends | None = None
    hd95: Ends | None = None
    surface_dice: Ends | None = None
    boundary_iou: Ends | None = None
    iou_per_class: list[Ends | None] | None = None


class Scores(_Facts):
    """Scores over the images of a split, at their own size; per class, None for one that is not present."""

    num_images: Count | None
    """None where only the sums of a federation's sites are known."""
    iou: Share | None
    dice: Share | None
    pixel_accuracy: Share | None
    iou_per_class: list[Share | None]
    dice_per_class: list[Share | None]
    boundaries: Outlines | None = None
    intervals: Intervals | None = None
    precision: list[str] | None = None
    """What each member computed in; None where it was not noted."""
    postprocess: list[dict[str, Any]] | None = None
    """The steps that were applied; None: those of the configuration."""


class Mechanism(_Facts):
    """Steps that touched the data, all alike."""

    noise_multiplier: Annotated[float, Field(ge=0)]
    sample_rate: Share
    steps: Count
    max_grad_norm: float


class Privacy(_Facts):
    """What all that a run has released costs: an upper bound."""

    epsilon: Annotated[float, Field(ge=0)] | None
    """None: there is no bound, so no privacy."""
    delta: Share
    accountant: str
    unit: str
    """Whom it protects: image or patient."""
    mechanisms: list[Mechanism]
    not_covered: list[str]


class Facts(NamedTuple):
    """Plain data for `Metadata`, and sentences about what could not be read."""

    metrics: dict[str, Any]
    """split -> `Scores`."""
    privacy: dict[str, Any] | None
    """`Privacy`; None where a member has none."""
    problems: list[str]


def collected(
    home: Path, checkpoints: Sequence[Path], weights: Sequence[float], federations: Sequence[Federation | None] = ()
) -> Facts:
    """Read what is known of members.

    Scores are those of `ml-inference` in `<home>/inference/<split>`, if it measured these files with these weights and
    without test-time augmentation; else those at the end of training, of a single `weights/best.pt`.

    Args:
        home: the run folder of a member; of several, the folder of the ensemble (`jobs.home_of`).
        checkpoints: the members' files.
        weights: their shares in the mean.
        federations: of each member that which trained it; empty where none did.
    """
    federations = federations or [None] * len(checkpoints)
    problems: list[str] = []
    digests = [digest_of(path) for path in checkpoints]
    summary: dict[str, Any] = {}
    if [path.resolve() for path in checkpoints] == [(home / "weights" / "best.pt").resolve()]:
        summary = _summary(_read(home / "metrics.json", MAPPING.validate_python, problems) or {}, federations[0])
    metrics = {}
    for split in SPLITS:
        path = home / "inference" / split / "metrics.json"
        measured = _read(path, MAPPING.validate_python, problems) or {}
        if _is_of(measured, digests, weights):
            how = measured["how"]
            raw: Any = {**measured, "precision": how.get("precision"), "postprocess": how.get("postprocess")}
        else:
            path, raw = home / "metrics.json", summary.get(split)
        scores = None if raw is None else _parsed(path, Scores.model_validate, raw, problems)
        if scores is not None:
            metrics[split] = scores.model_dump(mode="json")
    ledgers = [_ledger(path, federation, problems) for path, federation in zip(checkpoints, federations, strict=True)]
    privacy = _composed(ledgers, problems)
    return Facts(metrics, None if privacy is None else privacy.model_dump(mode="json"), problems)


def _is_of(measured: dict[str, Any], digests: Sequence[str], weights: Sequence[float]) -> bool:
    """Whether a measurement is of what is exported: these files, merged by these weights, each image seen once."""
    how = measured.get("how")
    if not isinstance(how, dict) or how.get("checkpoints") != list(digests) or how.get("tta") != []:
        return False
    shares = [round(weight, 6) for weight in weights]
    return how.get("weights") == shares and how.get("ensemble") != "hard_voting"


def _summary(contents: dict[str, Any], federation: Federation | None) -> dict[str, Any]:
    """The scores at the end of training, by split; of a server's, which has them by site, those of all sites.

    Where each site keeps its own batch normalisation, they are of the sites' networks, and so not of this one.
    """
    if federation is None:
        return contents
    if federation.config is None or federation.config.personalize != "none":
        return {}
    scores = {split: contents[split] for split in SPLITS if isinstance(contents.get(split), dict)}
    return {
        split: {"num_images": None, **one["all"]} if isinstance(one.get("all"), dict) else one
        for split, one in scores.items()
    }


def _ledger(checkpoint: Path, federation: Federation | None, problems: list[str]) -> Privacy | None:
    """The ledger of a run; a server that adds no noise of its own has none, but keeps the sites' in its file."""
    if federation is not None and federation.site is None:
        config = federation.config
        if config is None or config.central_dp is None:
            return None
    folder = checkpoint.parent
    home = folder.parent if folder.name == "weights" else folder
    return _read(home / "privacy.json", Privacy.model_validate, problems)


def _composed(ledgers: Sequence[Privacy | None], problems: list[str]) -> Privacy | None:
    """The price of releasing all members: epsilons and deltas add up (Dwork and Roth 2014, theorem 3.16).

    Without the ledger of each, and without one unit, nothing is promised.
    """
    known = [ledger for ledger in ledgers if ledger is not None]
    if not known or len(ledgers) == 1:
        return known[0] if known else None
    if len(known) < len(ledgers) or len({ledger.unit for ledger in known}) > 1:
        problems.append("the members' privacy has not one ledger each, of one unit, so that the ensemble has none")
        return None
    epsilons = [ledger.epsilon for ledger in known if ledger.epsilon is not None]
    return Privacy(
        epsilon=sum(epsilons) if len(epsilons) == len(known) else None,
        delta=min(1.0, sum(ledger.delta for ledger in known)),
        accountant=f"{', '.join(sorted({ledger.accountant for ledger in known}))}; summed over {len(known)} members",
        unit=known[0].unit,
        mechanisms=[mechanism for ledger in known for mechanism in ledger.mechanisms],
        not_covered=list(dict.fromkeys(sentence for ledger in known for sentence in ledger.not_covered)),
    )


def _read(path: Path, parse: Callable[[Any], T], problems: list[str]) -> T | None:
    """Return what a JSON file holds; None where it is missing or, with a sentence, damaged."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path} cannot be read ({error}), so what it says is not in the export")
        return None
    return _parsed(path, parse, contents, problems)


def _parsed(path: Path, parse: Callable[[Any], T], contents: Any, problems: list[str]) -> T | None:
    try:
        return parse(contents)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        problems.append(f"{path} is damaged ({place}: {first['msg']}), so what it says is not in the export")
        return None
