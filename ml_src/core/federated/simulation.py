"""trainer_type federated in one process: all sites on this machine, in turn, by the messages of real ones."""

import logging
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from ml_src.core.allocator import keep_freed_memory
from ml_src.core.atomic import remove_leftovers, write_text
from ml_src.core.callbacks import build_callbacks
from ml_src.core.checkpoint import load_checkpoint
from ml_src.core.config import Config
from ml_src.core.config_file import parse_config, to_yaml
from ml_src.core.errors import ConfigError
from ml_src.core.federated.client import answer
from ml_src.core.federated.journal import require_same_federation, set_aside
from ml_src.core.federated.link import Link
from ml_src.core.federated.local_grid import LocalGrid
from ml_src.core.federated.partition import write_partition
from ml_src.core.federated.processes.children import sigterm_as_interrupt
from ml_src.core.federated.rounds import Federation
from ml_src.core.federated.site import Site
from ml_src.core.federated.summary import measure
from ml_src.core.plugins import import_plugins
from ml_src.core.tasks import task_for
from ml_src.core.trainers import Outcome
from ml_src.core.trainers.resume import require_same_run
from ml_src.core.trainers.run_dir import command, log_to, open_run

log = logging.getLogger("ml_src")


def train(config: Config, resume: Path | None = None, overwrite: bool = False) -> Outcome:
    """Train one model over the sites of `config.federated`, then measure its best round on the images of each.

    Args:
        config: the whole run; `federated` names the sites or their number.
        resume: last.pt of a stopped run; its folder is used again.
        overwrite: remove an existing run of the same name.

    Raises: MLError for all that the user can mend.
    """
    keep_freed_memory()
    import_plugins(config.plugins)
    contents = None if resume is None else load_checkpoint(resume)
    run_dir = config.run_dir if resume is None else resume.parent.parent
    if contents is None:
        with TemporaryDirectory() as scratch:  # nothing is written before all is known to be well
            found = site_configs(config, Path(scratch))
            for site in found.values():
                task_for(site).check_data()
            build_callbacks(config, task_for(config).monitors, [], False)
            Federation(config, Link(LocalGrid({}), dict), run_dir, len(found))
        open_run(run_dir, overwrite, command("ml-train --resume", run_dir, config))
    else:
        _require_same(parse_config(contents["config"], source=str(resume)), config, contents, run_dir)
    with log_to(run_dir / "logs" / "train.log"):
        for folder in (run_dir, run_dir / "weights"):
            remove_leftovers(folder)
        (run_dir / "metrics.json").unlink(missing_ok=True)  # no longer finished
        if resume is not None:
            set_aside(resume, run_dir / "weights" / "last.pt")
        write_text(run_dir / "config.yaml", to_yaml(config))
        configs = site_configs(config, run_dir / "sites")
        names = list(configs)
        sites = [
            Site(name, site, run_dir / "sites" / name, index, keep_workers=False)
            for index, (name, site) in enumerate(configs.items())
        ]
        nodes = {name: number for number, name in enumerate(names, start=1)}
        grid = LocalGrid({nodes[site.name]: partial(answer, site) for site in sites})
        federation = Federation(config, Link(grid, lambda: nodes, is_patient=True), run_dir, len(sites))
        if contents is not None:
            federation.restore(contents)
        log.info("%s, %d sites: %s", run_dir, len(names), ", ".join(names))
        try:
            with sigterm_as_interrupt():
                federation.run()
        except KeyboardInterrupt:
            how = "Stopped before a round counted: start it again with ml-train --config."
            if federation.round:
                how = f"Stopped. To go on: {command('ml-train --resume', run_dir, config)}"
            return Outcome(run_dir, True, how)
        finally:
            federation.journal.close()
        return Outcome(run_dir, False, measure(federation.journal, {site.name: site for site in sites}))


def site_configs(config: Config, folder: Path) -> dict[str, Config]:
    """Return the configuration of each site of a simulation, by name; `folder` takes the index files of a partition.

    Raises: ConfigError where `federated` names no sites, or one that is no folder.
    """
    federated = config.federated
    assert federated is not None
    if federated.num_sites is not None:
        folders = [folder / "splits" / f"site_{number}" for number in range(federated.num_sites)]
        if not all(path.is_dir() for path in folders):
            folders = write_partition(config, folder / "splits")
        return {path.name: _at(config, splits_dir=str(path)) for path in folders}
    if not federated.sites:
        raise ConfigError("federated needs sites (a list of folders) or num_sites to be simulated on this machine")
    found: dict[str, Config] = {}
    for number, word in enumerate(federated.sites):
        path = Path(word)
        if not path.is_dir():
            raise ConfigError(f"federated.sites: {path} is no folder: give data folders, or what ml-split wrote")
        name = path.resolve().name
        while name in found:
            name += f"_{number}"
        has_images = (path / "splits").is_dir()
        found[name] = _at(config, data_dir=word, splits_dir=None) if has_images else _at(config, splits_dir=word)
    return found


def _at(config: Config, **data: str | None) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update=data)})


def _require_same(before: Config, now: Config, contents: dict[str, object], run_dir: Path) -> None:
    """Refuse to go on with other sites or another way of training; more rounds are welcome."""
    path = run_dir / "weights" / "last.pt"
    require_same_run(before, now, contents, path)
    old, new = before.federated, now.federated
    assert new is not None
    require_same_federation(old, new, path)
