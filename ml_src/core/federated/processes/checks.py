"""`ml-federated site --check`: all that can be known before a site takes part, each in one line; nothing is trained."""

import datetime
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cryptography import x509

from ml_src.core.errors import ConfigError, DataError, MLError
from ml_src.core.federated.kits import ServerKit, SiteKit, others_may_read, public_pem, read_site_kit
from ml_src.core.federated.processes.hello import Hello, say_hello

MAX_AHEAD, MAX_BEHIND = 3.0, 240.0  # seconds; the server refuses signatures of 5 s from now, or of 305 s ago
UNKNOWN_KEY = "the server {server} does not know the key of {name}: ask who runs it whether this kit is an old one"


@dataclass(frozen=True)
class Finding:
    """One line of the report. problem: what to do, or None where all is well."""

    subject: str
    problem: str | None

    @property
    def line(self) -> str:
        """The line."""
        return f"{self.subject}: {self.problem or 'ok'}"


def check_site(folder: Path, data_dir: Path) -> Iterator[Finding]:
    """Yield what is found, check after check; what cannot be known because of an earlier one is left out.

    Raises: ConfigError where the folder is no kit of a site.
    """
    kit = read_site_kit(folder)
    yield (config := _try("configuration", lambda: _check_own_config(kit)))
    if config.problem is None:
        yield _try("data", lambda: _check_data(kit, data_dir))
    yield (key := _try("key", lambda: _check_site_key(kit)))
    yield (certificate := _try("certificate", lambda: _check_certificate(kit)))
    if certificate.problem is not None:
        return
    hello: list[Hello] = []
    name = kit.name if key.problem is None else None
    yield _try("server", lambda: hello.append(say_hello(kit, name)))
    for said in hello:
        yield _try("clock", partial(_check_clock, said))
        if name is not None:
            yield _try("registration", partial(_check_registration, kit, said))


def require_kit(kit: SiteKit | ServerKit) -> None:
    """Check what makes a kit useless, before anything is started: its configuration, its key, its certificate.

    Raises: ConfigError, DataError.
    """
    _check_config(kit)
    if isinstance(kit, SiteKit):
        _check_site_key(kit)
    else:
        _check_key(kit)
    _check_certificate(kit)


def require_folder(data_dir: Path) -> None:
    """Check that there is a data folder.

    Raises: DataError.
    """
    if not data_dir.is_dir():
        problem = "is no folder" if data_dir.exists() else "does not exist"
        raise DataError(f"{data_dir} {problem}: give --data_dir the folder with images/, masks/ and splits/")


def require_welcome(kit: SiteKit, said: Hello) -> None:
    """Check that the server will take what this site signs.

    Raises: ConfigError.
    """
    _check_clock(said)
    _check_registration(kit, said)


def _try(subject: str, check: Callable[[], object]) -> Finding:
    try:
        check()
    except MLError as error:
        return Finding(subject, str(error))
    except OSError as error:
        return Finding(subject, f"{error.filename}: {error.strerror}")
    return Finding(subject, None)


def _check_config(kit: SiteKit | ServerKit) -> None:
    if kit.config().training.trainer_type != "federated":
        raise ConfigError(f"{kit.folder / 'config.yaml'} trains no federation: ask for the kit again")


def _check_own_config(kit: SiteKit) -> None:
    from ml_src.core.federated.facts import sections_of

    _check_config(kit)
    digests = sections_of(kit.config())
    changed = [name for name, digest in digests.items() if kit.sections.get(name, digest) != digest]
    if changed:
        raise ConfigError(
            f"config.yaml has changed since the kit was made, in {', '.join(changed)}: "
            "put it back, or have new kits made"
        )


def _check_data(kit: SiteKit, data_dir: Path) -> None:
    require_folder(data_dir)
    from ml_src.core.data.files import read_class_names
    from ml_src.core.tasks import task_for

    config, names = kit.config(data_dir), read_class_names(data_dir)
    if names is not None and len(names) != config.data.num_classes:
        raise DataError(
            f"{data_dir / 'classes.txt'} names {len(names)} classes, but the kit has {config.data.num_classes}: "
            "make them agree"
        )
    if names is not None and config.data.class_names is not None and names != config.data.class_names:
        raise DataError(
            f"{data_dir / 'classes.txt'} names {', '.join(names)}, but the kit {', '.join(config.data.class_names)}: "
            "make them agree"
        )
    task_for(config).check_data()


def _check_key(kit: SiteKit | ServerKit) -> None:
    if not kit.key.is_file():
        raise DataError(f"{kit.key} is missing: ask for the kit again")
    if others_may_read(kit.key):
        raise DataError(f"{kit.key} can be read by others: chmod 600 {kit.key}")


def _check_site_key(kit: SiteKit) -> None:
    _check_key(kit)
    key = kit.signing_key()
    if kit.name not in kit.public_keys:
        raise DataError(f"{kit.folder / 'keys'} has no key of {kit.name}: ask for the kit again")
    if public_pem(key.public_key()) != public_pem(kit.public_keys[kit.name]):
        raise DataError(f"{kit.key} is not the key of {kit.name}: ask for the kit again")


def _check_certificate(kit: SiteKit | ServerKit) -> None:
    try:
        certificate = x509.load_pem_x509_certificate(kit.ca.read_bytes())
    except ValueError:
        raise DataError(f"{kit.ca} holds no certificate: ask for the kit again") from None
    now = datetime.datetime.now(datetime.UTC)
    if now > certificate.not_valid_after_utc:
        raise DataError(f"{kit.ca} held until {certificate.not_valid_after_utc:%Y-%m-%d}: ask for a new kit")
    if now < certificate.not_valid_before_utc:
        raise DataError(
            f"{kit.ca} holds from {certificate.not_valid_before_utc:%Y-%m-%d} on: set the clock of this machine"
        )


def _check_clock(said: Hello) -> None:
    ahead = time.time() - said.time
    if not -MAX_BEHIND < ahead < MAX_AHEAD:
        word = "ahead of" if ahead > 0 else "behind"
        raise ConfigError(f"this machine is {abs(ahead):.0f} s {word} the server: set the clock (NTP) here or there")


def _check_registration(kit: SiteKit, said: Hello) -> None:
    if not said.known:
        raise ConfigError(UNKNOWN_KEY.format(server=kit.address, name=kit.name))
