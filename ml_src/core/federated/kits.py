"""What `ml-federated init` writes: a folder for the server and one for each site, with keys to know each other by.

The certificate authority is made for this federation, signs the server's certificate, and its key is then forgotten.
Next to read: `processes/`, which start from these folders.
"""

import datetime
import ipaddress
import itertools
import logging
import re
import secrets
import shutil
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ml_src.core.config import Config
from ml_src.core.config_file import load_config, parse_config, read_yaml
from ml_src.core.errors import ConfigError, DataError
from ml_src.core.federated_specs import Strategy

VALIDITY = datetime.timedelta(days=730)
BACKDATED = datetime.timedelta(hours=1)  # clocks of sites may be slow
MAX_REQUEST_MB = 32  # Flower cuts arrays into pieces of 5 MiB, so no honest request comes near
DATA_DIR = "data"  # stands in the kits for what each site gives by --data_dir
log = logging.getLogger("ml_src")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,40}")
_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")

_README = {
    "server": """\
This folder is the server of the federation {federation}. Nobody else may read it: server.key is its identity.
Give each site its folder over a channel that you trust; a site's folder must not be seen by other sites either.
Start it with `ml-federated server .`; stopped or killed, the same command goes on where it was.
See who is connected and how far it is with `ml-federated status .`; logs are in state/.
Port {port} must be reachable from the sites. Certificates and keys hold until {until}; then make new kits.
""",
    "site": """\
This folder is the site {name} of a federation. Nobody else may read it: node.key is the site's identity.
Read config.yaml: it says what is trained here, and nothing that the server sends can change it. Images stay here.
First `ml-federated site . --data_dir DATA --check`: it tests data, keys, clock and network, and trains nothing.
Then `ml-federated site . --data_dir DATA` takes part; it waits for the server at {address}.
When the federation is over it ends by itself, and the network is in run/weights/best.pt.
`ml-federated status .` says what it has done; logs are in state/. Keys hold until {until}; then ask for a new kit.
""",
}


@dataclass(frozen=True)
class Kit:
    """What both kinds of kits have: the training, the address of the server, a certificate, the keys of all sites."""

    folder: Path
    federation: str
    host: str
    port: int

    @property
    def address(self) -> str:
        """HOST:PORT of the server, as sites reach it."""
        return f"{self.host}:{self.port}"

    @property
    def state(self) -> Path:
        """Logs and tokens: all that comes and goes."""
        return self.folder / "state"

    @property
    def ca(self) -> Path:
        """The certificate that the server's is checked against."""
        return self.folder / "ca.pem"

    def config(self, data_dir: Path | None = None) -> Config:
        """Return the training of the kit, on a data folder.

        Raises: ConfigError with every mistake in config.yaml.
        """
        overrides = _real_sites(len(self.public_keys))
        if data_dir is not None:
            overrides |= {"data.data_dir": str(data_dir), "data.splits_dir": None}
        for path in (self.folder / "config.yaml", self.ca):
            if not path.is_file():
                raise ConfigError(f"{path} is missing: ask for the kit again")
        return load_config(self.folder / "config.yaml", overrides)

    @cached_property
    def public_keys(self) -> dict[str, ec.EllipticCurvePublicKey]:
        """The public keys of all sites, by name, sorted."""
        return {path.stem: _read_public_key(path) for path in sorted((self.folder / "keys").glob("*.pub"))}


@dataclass(frozen=True)
class ServerKit(Kit):
    """The kit of the server."""

    listen: str
    max_request_mb: int

    @property
    def certificate(self) -> Path:
        """The server's certificate."""
        return self.folder / "server.pem"

    @property
    def key(self) -> Path:
        """The private key of it."""
        return self.folder / "server.key"

    @property
    def token(self) -> Path:
        """Where the running server writes what its own command is known by."""
        return self.state / "token"


@dataclass(frozen=True)
class SiteKit(Kit):
    """The kit of a site."""

    name: str
    sections: dict[str, str]
    """Digests of the configuration as it was made, see `facts.sections_of`; empty in kits that are older than this."""

    @property
    def key(self) -> Path:
        """The private key of the site, in OpenSSH's format."""
        return self.folder / "node.key"

    def signing_key(self) -> ec.EllipticCurvePrivateKey:
        """Return the private key of the site.

        Raises: DataError where the file holds none.
        """
        try:
            key = serialization.load_ssh_private_key(self.key.read_bytes(), password=None)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.key} holds no private key ({error}): ask for the kit again") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise DataError(f"{self.key} is not an ECDSA key: ask for the kit again")
        return key


def read_server_kit(folder: Path) -> ServerKit:
    """Read a server kit.

    Raises: ConfigError where the folder is none.
    """
    raw = _read(folder, "server.yaml")
    return ServerKit(
        folder=folder.resolve(),
        federation=str(_entry(raw, "federation", folder / "server.yaml")),
        **_host_and_port(raw, folder / "server.yaml"),
        listen=str(_entry(raw, "listen", folder / "server.yaml")),
        max_request_mb=int(_entry(raw, "max_request_mb", folder / "server.yaml")),
    )


def read_site_kit(folder: Path) -> SiteKit:
    """Read the kit of a site.

    Raises: ConfigError where the folder is none.
    """
    raw = _read(folder, "site.yaml")
    return SiteKit(
        folder=folder.resolve(),
        federation=str(_entry(raw, "federation", folder / "site.yaml")),
        **_host_and_port(raw, folder / "site.yaml"),
        name=str(_entry(raw, "name", folder / "site.yaml")),
        sections=dict(raw.get("sections", {})),
    )


def read_kit(folder: Path) -> ServerKit | SiteKit:
    """Read a kit of either kind.

    Raises: ConfigError where the folder is none.
    """
    return read_server_kit(folder) if (folder / "server.yaml").exists() else read_site_kit(folder)


def public_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    """Return a public key as Flower stores and sends it."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def parse_address(address: str) -> tuple[str, int]:
    """Split HOST:PORT; the host is a name or an IPv4 address.

    Raises: ConfigError where it is neither.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or not 1 <= int(port) <= 65535 or not _HOST_NAME.fullmatch(host):
        raise ConfigError(
            f"address {address!r}: write it as HOST:PORT, a name or an IPv4 address under which all sites reach "
            "the server, such as federation.example.org:9092"
        )
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine and nobody else's."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def write_kits(config_path: Path, sites: Sequence[str], address: str, output: Path) -> list[Path]:
    """Write the kits of a federation under `output`, all or none, and return their folders, the server's first.

    Raises: ConfigError where the configuration is not of a federation, names are doubled or odd, or `output` exists.
    """
    host, port = parse_address(address)
    _require_names(sites)
    if load_config(config_path, {"data.data_dir": DATA_DIR}).training.trainer_type != "federated":
        raise ConfigError(f"{config_path} has another trainer_type: set training.trainer_type to federated")
    raw = _without_local_folders(read_yaml(config_path))
    config = parse_config(raw, _real_sites(len(sites)), source=str(config_path))
    assert config.federated is not None
    from ml_src.core.federated.aggregation import too_few  # takes seconds to import
    from ml_src.core.federated.facts import sections_of

    if problem := too_few(config.federated, config.federated.num_chosen(len(sites))):
        raise ConfigError(problem)
    if output.exists():
        raise ConfigError(f"{output} exists: keys are never written over; remove it, or give another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f"{output.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir(mode=0o700)
    try:
        _write_all(temporary, _yaml(raw), sections_of(config), sites, host, port)
        temporary.rename(output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _say_if_none_may_be_wrong(config.federated.strategy, len(sites))
    return [output / name for name in ("server", *sites)]


def _real_sites(num_sites: int) -> dict[str, Any]:
    """What stands in a configuration in place of the sites of a simulation."""
    return {"federated.sites": None, "federated.num_sites": num_sites}


def _without_local_folders(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sound configuration without the folders of the machine where kits are made."""
    data = {key: value for key, value in raw["data"].items() if key not in ("data_dir", "splits_dir")}
    federated = {key: value for key, value in raw["federated"].items() if key != "sites"}
    return {**raw, "data": {"data_dir": DATA_DIR, **data}, "federated": federated}


def _say_if_none_may_be_wrong(strategy: Strategy, num_sites: int) -> None:
    """Log how many sites the Krum family needs to bear a wrong one, where it was left to find that out itself."""
    from ml_src.core.federated.aggregation import bears

    if getattr(strategy, "num_malicious", 0) is None and bears(strategy, num_sites) == 0:
        enough = next(number for number in itertools.count(num_sites) if bears(strategy, number))
        log.info("%s: with %d sites none may be wrong; %d are needed to bear one", strategy.type, num_sites, enough)


def _require_names(sites: Sequence[str]) -> None:
    for name in sites:
        if not _NAME.fullmatch(name) or name.lower() == "server":
            raise ConfigError(f"site {name!r}: names are letters, digits, - and _, and none is `server`")
    if len({name.lower() for name in sites}) < len(sites):
        raise ConfigError("two sites have one name: give each its own")


def _write_all(
    folder: Path, config: bytes, sections: Mapping[str, str], sites: Sequence[str], host: str, port: int
) -> None:
    federation = secrets.token_hex(8)
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    ca_certificate, certificate, server_key = _certificates(federation, host, now)
    keys = {name: ec.generate_private_key(ec.SECP384R1()) for name in sites}
    words = {"federation": federation, "port": port, "address": f"{host}:{port}", "until": f"{now + VALIDITY:%Y-%m-%d}"}
    common = {
        "config.yaml": config,
        "ca.pem": ca_certificate.public_bytes(serialization.Encoding.PEM),
        **{f"keys/{name}.pub": _public_line(key, name) for name, key in keys.items()},
    }
    server = {
        "federation": federation,
        "address": f"{host}:{port}",
        "listen": "127.0.0.1" if is_loopback(host) else "0.0.0.0",
        "max_request_mb": MAX_REQUEST_MB,
    }
    _write_kit(
        folder / "server",
        common
        | {
            "server.yaml": _yaml(server),
            "server.pem": certificate.public_bytes(serialization.Encoding.PEM),
            "README.txt": _README["server"].format(**words).encode("utf-8"),
        },
        {"server.key": _private(server_key, serialization.PrivateFormat.PKCS8)},
    )
    for name, key in keys.items():
        site = {"federation": federation, "name": name, "address": f"{host}:{port}", "sections": dict(sections)}
        readme = _README["site"].format(name=name, **words)
        _write_kit(
            folder / name,
            common | {"site.yaml": _yaml(site), "README.txt": readme.encode("utf-8")},
            {"node.key": _private(key, serialization.PrivateFormat.OpenSSH)},
        )


def _write_kit(folder: Path, public: Mapping[str, bytes], private: Mapping[str, bytes]) -> None:
    folder.mkdir(mode=0o700)
    (folder / "keys").mkdir()
    for name, content in public.items():
        (folder / name).write_bytes(content)
    for name, content in private.items():
        path = folder / name
        path.touch(mode=0o600)  # before there is anything to read in it
        path.write_bytes(content)


def _certificates(
    federation: str, host: str, now: datetime.datetime
) -> tuple[x509.Certificate, x509.Certificate, ec.EllipticCurvePrivateKey]:
    """Return the certificate of a new authority, the server's, and the key of the latter."""
    ca_key, server_key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    ca_name = _name(f"federation {federation}")
    usage = {"content_commitment": False, "key_encipherment": False, "data_encipherment": False, "key_agreement": False}
    usage |= {"encipher_only": False, "decipher_only": False}
    ca_identifier = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    ca = (
        _unsigned(ca_name, ca_name, ca_key.public_key(), now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=False, key_cert_sign=True, crl_sign=True, **usage), critical=True
        )
        .add_extension(ca_identifier, critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    certificate = (
        _unsigned(_name(host[:64]), ca_name, server_key.public_key(), now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=True, key_cert_sign=False, crl_sign=False, **usage), critical=True
        )
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(_alternative_names(host)), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(server_key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_identifier), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    return ca, certificate, server_key


def _unsigned(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime.datetime
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(now - BACKDATED).not_valid_after(now + VALIDITY)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _alternative_names(host: str) -> list[x509.GeneralName]:
    """The host, and 127.0.0.1: the server's own command speaks to it there."""
    names: list[x509.GeneralName] = [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    try:
        address = ipaddress.ip_address(host)
        names += [] if str(address) == "127.0.0.1" else [x509.IPAddress(address)]
    except ValueError:
        names.append(x509.DNSName(host))
    if is_loopback(host) and host != "localhost":
        names.append(x509.DNSName("localhost"))
    return names


def _private(key: ec.EllipticCurvePrivateKey, format: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, format, serialization.NoEncryption())


def _public_line(key: ec.EllipticCurvePrivateKey, name: str) -> bytes:
    line = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return line + f" {name}\n".encode()


def _read_public_key(path: Path) -> ec.EllipticCurvePublicKey:
    try:
        key = serialization.load_ssh_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} holds no public key ({error}): ask for the kit again") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise DataError(f"{path} is not an ECDSA key: ask for the kit again")
    return key


def _yaml(contents: Mapping[str, Any]) -> bytes:
    text: str = yaml.safe_dump(dict(contents), sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    return text.encode("utf-8")


def _read(folder: Path, name: str) -> dict[str, Any]:
    if not folder.exists():
        raise ConfigError(f"{folder} does not exist: give a folder that ml-federated init wrote")
    if not (folder / name).is_file():
        raise ConfigError(f"{folder} has no {name}: give a folder that ml-federated init wrote")
    raw = read_yaml(folder / name)
    if not isinstance(raw, dict):
        raise ConfigError(f"{folder / name} is not a mapping: ask for the kit again")
    return raw


def _entry(raw: Mapping[str, Any], key: str, path: Path) -> Any:
    if key not in raw:
        raise ConfigError(f"{path} has no entry {key}: ask for the kit again")
    return raw[key]


def _host_and_port(raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
    host, port = parse_address(str(_entry(raw, "address", path)))
    return {"host": host, "port": port}


def others_may_read(path: Path) -> bool:
    """Return whether a file can be read or written by others than its owner."""
    return bool(path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO))
