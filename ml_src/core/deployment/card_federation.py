"""The part of MODEL_CARD.md on those who trained a network together."""

from ml_src.core.deployment.federation import Federation
from ml_src.core.deployment.markdown import table, text
from ml_src.core.export.metadata import Metadata


def federations(metadata: Metadata) -> list[Federation]:
    """Those of the members that were trained by one."""
    return [Federation.model_validate(one["federation"]) for one in metadata.checkpoints if "federation" in one]


def federation_lines(metadata: Metadata) -> list[str]:
    """Return a section for each member that a federation trained."""
    lines = []
    for one in metadata.checkpoints:
        if "federation" in one:
            of = f" of {text(one['name'])}" if len(metadata.checkpoints) > 1 else ""
            lines += ["", f"## Federation{of}", "", *_of_federation(Federation.model_validate(one["federation"]))]
    return lines[1:]


def _of_federation(one: Federation) -> list[str]:
    images = "" if one.num_images is None else f", with {one.num_images} training images in all"
    lines = [f"It was trained by a federation of {_number_of_sites(one)}{images}."]
    if one.site is not None:
        kinds = {
            "global": f"The network of all sites, as the site {text(one.site)} was given it.",
            "personal": f"The network of all sites, with the batch normalisation of the site {text(one.site)}.",
            "local": f"The network of the site {text(one.site)} after its own part of a round, before it became one "
            "with those of others.",
        }
        lines.append(kinds[one.network])
    if one.sites:
        lines += ["", *_sites(one)]
    elif one.num_sites != 1:
        lines.append("The names of its sites are not all known here.")
    return [*lines, "", *(f"- {line}" for line in _ways(one))]


def _sites(one: Federation) -> list[str]:
    """The table of the sites, with the columns of which something is known."""
    columns: dict[str, dict[str, int | str | None]] = {
        "training images": {name: share.num_images for name, share in one.sites.items()},
        "rounds with its update": {name: share.num_rounds for name, share in one.sites.items()},
        "epsilon spent": {
            name: None if share.epsilon is None else f"{share.epsilon:.4g}" for name, share in one.sites.items()
        },
    }
    known = {head: values for head, values in columns.items() if any(value is not None for value in values.values())}
    rows = [
        [text(name), *("not known" if values[name] is None else str(values[name]) for values in known.values())]
        for name in one.sites
    ]
    return table(["site", *known], rows)


def _ways(one: Federation) -> list[str]:
    """Rounds, strategy and what protects the sites, a sentence each."""
    if one.config is None:
        return ["Its rounds, its strategy and what protected the sites are not known here."]
    config = one.config
    ended = "" if one.num_rounds is None else f"; the federation ended after {one.num_rounds}"
    given = config.strategy.model_dump(exclude={"type"}, exclude_none=True)
    options = ", ".join(f"{key} {value}" for key, value in given.items())
    at_sites = "on, each site with a budget of its own" if config.backend == "dp" else "off"
    central = "off"
    if config.central_dp is not None:
        noise = config.central_dp
        central = (
            f"on, noise multiplier {noise.noise_multiplier:g}, clip norm {noise.clip_norm:g}; the unit is one site"
        )
        if one.site is not None:
            central += "; the server knows what epsilon came to"
    lines = [
        f"Round: {one.round} of {config.rounds} that were planned{ended}.",
        f"Strategy: {config.strategy.type}{f' ({options})' if options else ''}.",
        f"Secure aggregation: {'on, the server saw sums over sites only' if config.secure_aggregation else 'off'}.",
        f"Differential privacy at the sites: {at_sites}.",
        f"Differential privacy at the server: {central}.",
    ]
    if config.personalize == "batch_norm":
        lines.append("Each site trained with a batch normalisation of its own (FedBN).")
    return [text(line) for line in lines]


def trained_by(one: Federation) -> str:
    """What a federation is called in the limits."""
    names = f" ({text(', '.join(one.sites))})" if one.sites else ""
    return f"by a federation of {_number_of_sites(one)}{names}"


def _number_of_sites(one: Federation) -> str:
    return f"{'several' if one.num_sites is None else one.num_sites} site{'s' * (one.num_sites != 1)}"
