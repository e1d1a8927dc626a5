"""What a checkpoint, and the run folder around it, tell of the federation that trained it. Next to read: `card.py`.

A server's or a simulation's checkpoint holds the journal of its rounds; a site's holds an entry `federation`, so that
it says so wherever it is copied to. What is not known is None.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ml_src.core.federated_specs import FederatedConfig

Count = Annotated[int, Field(ge=0)]


class Share(BaseModel):
    """What one site has given."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    num_images: Count | None = None
    """Its training images."""
    num_rounds: Count | None = None
    """In how many rounds, up to that of the network, its update was used."""
    epsilon: Annotated[float, Field(ge=0)] | None = None
    """What it has spent over all rounds under differential privacy at the sites."""


class Federation(BaseModel):
    """Who has trained a network together, and how."""

    model_config = ConfigDict(extra="ignore")

    network: Literal["global", "personal", "local"] = "global"
    """That of all sites; the same with the batch normalisation of one; that of one before it was averaged."""
    site: str | None = None
    """Whose file it is; None where it is the server's or a simulation's."""
    sites: dict[str, Share] = {}
    """By name; empty where the names are not known."""
    num_images: Count | None = None
    """Training images of all sites."""
    round: Count | None = None
    num_rounds: Count | None = None
    """How many there were when the federation had ended."""
    config: FederatedConfig | None = None

    @property
    def num_sites(self) -> int | None:
        """How many sites there were."""
        if self.sites or self.config is None:
            return len(self.sites) or None
        return self.config.num_sites or (len(self.config.sites) if self.config.sites else None)


def federation_of(path: Path, contents: Mapping[str, Any], problems: list[str]) -> Federation | None:
    """Return the federation that trained a checkpoint, None where none did.

    Args:
        path: of the checkpoint; in the folder `weights` of a run, the run's files are read too.
        contents: what the checkpoint holds.
        problems: takes a sentence for each thing that cannot be read.
    """
    home = path.parent.parent if path.parent.name == "weights" else None
    journal = contents["backend_state_dict"].get("journal")
    entry = contents.get("federation")
    if journal is None and entry is None and (home is None or not (home / "site.json").exists()):
        return None
    try:
        found = Federation.model_validate((entry or {}) if journal is None else _of_journal(contents, journal))
    except (ValidationError, KeyError, TypeError, AttributeError):
        problems.append(f"what {path} says of its federation is damaged, so it is not in the export")
        found = Federation()
    if home is None:
        return found
    rounds = _num_rounds(home, found)
    return found.model_copy(update={"num_rounds": rounds, "sites": _with_epsilons(home, found.sites)})


def _of_journal(contents: Mapping[str, Any], journal: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a server's or a simulation's checkpoint."""
    number, known = contents["epoch"], journal["fingerprint"]["num_images"]
    trained = [entry["sites"] for entry in journal["rounds"][:number]]
    images = dict(known) | {name: told["num_images"] for sites in trained for name, told in sites.items()}
    return {
        "sites": {
            name: {"num_images": num_images, "num_rounds": sum(name in sites for sites in trained)}
            for name, num_images in sorted(images.items())
        },
        "num_images": sum(images.values()),
        "round": number,
        "config": contents["config"]["federated"],
    }


def _num_rounds(home: Path, found: Federation) -> int | None:
    """How many rounds a federation had that has ended: a site was told, others have written it with their scores."""
    told = _json(home / "ended.json").get("num_rounds")
    number = _json(home / "metrics.json").get("num_epochs") if told is None else told
    return number if isinstance(number, int) and number >= (found.round or 0) else None


def _with_epsilons(home: Path, sites: Mapping[str, Share]) -> dict[str, Share]:
    """Sites with what each has spent, as the server has written it down."""
    ledgers = _json(home / "privacy.json").get("sites")
    spent = {} if not isinstance(ledgers, dict) else ledgers
    found = dict(sites)
    for name in sites.keys() & spent.keys():
        epsilon = spent[name].get("epsilon") if isinstance(spent[name], dict) else None
        if isinstance(epsilon, int | float) and epsilon >= 0:
            found[name] = sites[name].model_copy(update={"epsilon": epsilon})
    return found


def _json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where it cannot be read, which `facts.py` says."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return contents if isinstance(contents, dict) else {}
