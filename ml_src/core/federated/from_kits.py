"""Real sites: from the folders of `ml-federated init` to a Federation at the server and a Site at each hospital.

Next to read: `processes/server.py` and `processes/site.py`, which call these two.
"""

import logging
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ml_src.core.federated.flower  # noqa: F401  # before flwr
from flwr.app import Context, Message
from flwr.serverapp import Grid
from ml_src.core.allocator import keep_freed_memory
from ml_src.core.atomic import remove_leftovers, write_json, write_text
from ml_src.core.checkpoint import load_checkpoint, previous_of
from ml_src.core.config import Config
from ml_src.core.config_file import parse_config, to_yaml
from ml_src.core.federated import client
from ml_src.core.federated.journal import require_same_federation, set_aside
from ml_src.core.federated.kits import read_server_kit, read_site_kit
from ml_src.core.federated.link import LOOK, Link
from ml_src.core.federated.processes.runtime import connected_since, connected_sites
from ml_src.core.federated.processes.tuning import fetch_soon
from ml_src.core.federated.processes.worker import DIARY, note
from ml_src.core.federated.rounds import Federation
from ml_src.core.federated.secure_round import Keys
from ml_src.core.federated.site import Site
from ml_src.core.federated.site_state import BEST, RUN
from ml_src.core.metrics.segmentation import summarize
from ml_src.core.plugins import import_plugins
from ml_src.core.tasks import task_for
from ml_src.core.trainers.resume import checkpoint_of

AWAY = 20.0  # seconds that sites which were away at the end have to come: they look for the server every 5 s
PATIENCE = 20.0  # seconds for one of the three letters to them: one that is silent must not keep the others waiting
log = logging.getLogger("ml_src")


def lead(grid: Grid, folder: Path) -> None:
    """Lead the rounds of a server kit, from where its journal stands, and write what came of them."""
    keep_freed_memory()
    kit = read_server_kit(folder)
    config, run_dir = kit.config(), kit.folder / RUN
    _fetch_as_long_as_a_round(config)
    import_plugins(config.plugins)
    (run_dir / "weights").mkdir(parents=True, exist_ok=True)
    for path in (run_dir, run_dir / "weights"):
        remove_leftovers(path)
    has_ended = (run_dir / "metrics.json").exists()
    if has_ended:
        log.info("this federation has ended: see %s; new kits train anew", run_dir / "summary.txt")
    link = Link(grid, lambda: connected_sites(grid, kit), lambda: connected_since(grid, kit))
    federation = Federation(config, link, run_dir, len(kit.public_keys))
    last = run_dir / "weights" / "last.pt"
    if last.exists() or previous_of(last).exists():
        path = checkpoint_of(run_dir)
        contents = load_checkpoint(path)
        _require_same(parse_config(contents["config"], source=str(path)), config, path)
        federation.restore(contents)
        if has_ended:  # else it may go on, with a larger budget for instance
            federation.journal.stop = contents["backend_state_dict"]["journal"]["stop"]
        set_aside(path, last)
        if not has_ended:
            log.info("going on after round %d", federation.round)
    if has_ended:
        _tell_those_who_come(federation, set(kit.public_keys))
        return
    write_text(run_dir / "config.yaml", to_yaml(config))
    try:
        federation.run()
        _conclude(federation, run_dir)
        away = kit.public_keys.keys() - set(_tell_end(federation, federation.session.here()))
    finally:
        federation.journal.close()
    if away:
        log.info("%s: not told of the end; this command tells it when it is given again", ", ".join(sorted(away)))


def _fetch_as_long_as_a_round(config: Config) -> None:
    """Wait for all of a message whose beginning is there, in this process: a slow network may take minutes."""
    assert config.federated is not None
    fetch_soon(config.federated.round_timeout)


def _require_same(before: Config, now: Config, path: Path) -> None:
    assert now.federated is not None
    require_same_federation(before.federated, now.federated, path)


def _conclude(federation: Federation, run_dir: Path) -> None:
    """Let the sites measure the best weights at the images' own size, and write summary.txt and metrics.json."""
    config, journal = federation.config, federation.journal
    best = load_checkpoint(run_dir / "weights" / "best.pt")
    measured = federation.measure(best["model_state_dict"])
    reports = {
        split: {site: summarize(counts, config.ignore_index) for site, counts in {**of_sites, "all": total}.items()}
        for split, (total, of_sites) in measured.items()
    }
    lines = [f"{run_dir}: best round {best['epoch']} of {len(journal.rounds)}, {journal.seconds() / 60:.1f} min"]
    lines += [f"Stopped early: {journal.stop}."] if journal.stop else []
    for split, scores in reports.items():
        lines += ["", f"{split}, at the images' own size:"]
        lines += [f"  {name}: mean IoU {one['iou']:.4f}, mean Dice {one['dice']:.4f}" for name, one in scores.items()]
    write_text(run_dir / "summary.txt", "\n".join(lines) + "\n")
    contents = {"best_epoch": best["epoch"], "num_epochs": len(journal.rounds), "seconds": journal.seconds()}
    write_json(run_dir / "metrics.json", contents | {split: _plain(scores) for split, scores in reports.items()})
    for line in lines:
        log.info(line)


def _tell_end(federation: Federation, sites: Collection[str]) -> list[str]:
    """Give sites the best network and tell them that all is over; return those that have it now."""
    told = federation.tell_end(load_checkpoint(federation.journal.run_dir / "weights" / BEST), sites)
    if told:
        log.info("%s: told of the end, and given the best network", ", ".join(told))
    return told


def _tell_those_who_come(federation: Federation, left: set[str]) -> None:
    """Tell the end to sites that were away when it came, and come while the server is there again.

    Whose letter is lost is tried again while there is time, in another session: it may have been started anew. Who has
    come while a silent one was waited for is tried once even where there is none left.
    """
    session, end = federation.session, time.monotonic() + AWAY
    log.info("waiting %g s for sites that were not told of it", AWAY)
    session.federated = session.federated.model_copy(update={"round_timeout": PATIENCE})
    tried: set[str] = set()
    while left:
        is_over = time.monotonic() > end
        come = (left & session.link.nodes().keys()) - (tried if is_over else set())
        if come:
            session.begin()
            is_lost = session.join(sorted(come), federation.round)
            unfit = set() if is_lost else come - session.num_images.keys()
            left -= unfit.union(_tell_end(federation, session.here()))
            tried |= come
        elif is_over:
            return
        time.sleep(LOOK)


def _plain(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Scores as JSON has them, which knows no NaN."""
    return {
        site: {key: value if value == value else None for key, value in one.items()} for site, one in scores.items()
    }


def answerer(folder: Path, data_dir: Path) -> Callable[[Message, Context], Message]:
    """Return what answers the messages of a federation with the images of `data_dir`; called once a process."""
    keep_freed_memory()
    kit = read_site_kit(folder)
    config = kit.config(data_dir)
    _fetch_as_long_as_a_round(config)
    import_plugins(config.plugins)
    names = list(kit.public_keys)
    keys = Keys(kit.signing_key(), {name: key for name, key in kit.public_keys.items() if name != kit.name})
    task_for(config).check_data()  # a site without its data had better not begin
    site = Site(
        kit.name,
        _private(config),
        kit.folder / RUN,
        names.index(kit.name),
        keys=keys,
        note=partial(note, kit.state / DIARY),
    )
    return lambda message, context: client.answer(site, message, is_private=True)


def _private(config: Config) -> Config:
    """Take the noise of dp from the system: the server has the configuration, and must not be able to repeat it."""
    if config.training.dp is None:
        return config
    dp = config.training.dp.model_copy(update={"secure": True})
    return config.model_copy(update={"training": config.training.model_copy(update={"dp": dp})})
