"""The command ml-federated: kits for a federation, its server, its sites. Next to read: `core/federated/kits.py`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ml_src.cli._app import Parser, run

_USES = {
    "init": "write a kit for the server and one for each site: keys, certificates, the training",
    "server": "run the server of a kit; stopped or killed, the same command goes on",
    "site": "take part as the site of a kit, until the federation ends",
    "status": "say who is connected, how far it is, what went wrong last",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ml-federated and return its exit code: with --check, 2 where something has to be mended first."""
    return run(_federated, argv)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    uses = "; ".join(f"{name}: {use}" for name, use in _USES.items())
    parser = Parser("ml-federated", f"Train one model over several data holders. {uses}.")
    add = parser.add_argument
    add("use", choices=list(_USES), metavar="USE", help=", ".join(_USES))
    add("kit", nargs="?", metavar="KIT", help="for server, site and status: the folder that init has written")
    add("--config", metavar="F.yaml", help="for init: what is trained, with trainer_type federated")
    add("--sites", nargs="+", metavar="NAME", help="for init: the names of the sites")
    add("--address", metavar="HOST:PORT", help="for init: where all sites reach the server")
    add("--output", metavar="DIR", help="for init: where the kits are written (default federation)")
    add("--data_dir", metavar="DIR", help="for site: its own data, as for ml-train")
    add("--check", action="store_true", help="for site: test data, keys, clock and network, and train nothing")
    args = parser.parse(argv)
    _require_sense(args)
    return args


def _require_sense(args: argparse.Namespace) -> None:
    from ml_src.core.errors import ConfigError

    needed = {"init": ("config", "sites", "address"), "site": ("kit", "data_dir")}.get(args.use, ("kit",))
    allowed = {*needed, *{"init": ("output",), "site": ("check",)}.get(args.use, ())}
    flags = {name: "KIT" if name == "kit" else f"--{name}" for name in vars(args) if name not in ("use", "debug")}
    for name, flag in flags.items():
        given = getattr(args, name) not in (None, False)
        if name in needed and not given:
            raise ConfigError(f"ml-federated {args.use} needs {flag} (ml-federated --help shows the usage)")
        if given and name not in allowed:
            raise ConfigError(f"{flag} is not for ml-federated {args.use} (ml-federated --help shows the usage)")


def _federated(argv: Sequence[str]) -> int:
    args = _arguments(argv)
    _require_extra()
    uses = {"init": _init, "server": _server, "site": _site, "status": _status}
    return uses[args.use](args)


def _require_extra() -> None:
    from importlib.util import find_spec

    from ml_src.core.errors import ConfigError

    if find_spec("flwr") is None or find_spec("cryptography") is None:
        raise ConfigError("ml-federated needs Flower, which is not installed: run pip install 'ml-src[federated]'")


def _init(args: argparse.Namespace) -> int:
    from ml_src.core.federated.kits import VALIDITY, write_kits

    folders = write_kits(Path(args.config), args.sites, args.address, Path(args.output or "federation"))
    for folder in folders:
        print(folder)
    print(f"keys and certificates hold for {VALIDITY.days} days; give each site its folder over a channel you trust")
    return 0


def _server(args: argparse.Namespace) -> int:
    from ml_src.core.federated.processes.server import serve

    serve(Path(args.kit))
    return 0


def _site(args: argparse.Namespace) -> int:
    if args.check:
        return _check(args)

    from ml_src.core.federated.processes.site import take_part

    take_part(Path(args.kit), Path(args.data_dir))
    return 0


def _check(args: argparse.Namespace) -> int:
    from ml_src.core.federated.processes.checks import check_site

    well = True
    for finding in check_site(Path(args.kit), Path(args.data_dir)):
        print(finding.line, flush=True)
        well &= finding.problem is None
    return 0 if well else 2


def _status(args: argparse.Namespace) -> int:
    from ml_src.core.federated.processes.status import status

    for line in status(Path(args.kit)):
        print(line)
    return 0
