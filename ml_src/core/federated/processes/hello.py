"""A site asks the server whether it is there, what time it is, and whether it knows the site's key; no Flower in it.

Every way in which that fails becomes one sentence that says who can mend it.
"""

import http.client
import json
import socket
import ssl
from dataclasses import dataclass
from hashlib import sha256

from ml_src.core.errors import MLError
from ml_src.core.federated.kits import Kit, public_pem
from ml_src.core.federated.processes.superlink import HELLO

TIMEOUT = 5.0  # seconds
_HOSTNAME_MISMATCH, _IP_MISMATCH, _NOT_YET_VALID, _EXPIRED = 62, 64, 9, 10  # OpenSSL's X509_V_ERR numbers


class UnreachableError(MLError):
    """The server is not there, yet or any more: waiting may help."""


class RefusedError(MLError):
    """The server is there, and it is not the right one or does not want this site: waiting does not help."""


@dataclass(frozen=True)
class Hello:
    """What the server says. time: seconds since 1970. known: whether the key is registered."""

    time: float
    known: bool


def say_hello(kit: Kit, site: str | None = None, host: str | None = None) -> Hello:
    """Ask the kit's server, at its address or at `host`, about a site's key.

    Raises: UnreachableError, RefusedError.
    """
    key = public_pem(kit.public_keys[site]) if site is not None else b""
    context = ssl.create_default_context(cafile=str(kit.ca))
    connection = http.client.HTTPSConnection(host or kit.host, kit.port, timeout=TIMEOUT, context=context)
    where = f"the server {kit.address}"
    try:
        connection.request("GET", f"{HELLO}?{sha256(key).hexdigest()}")
        response = connection.getresponse()
        said = json.loads(response.read(10_000)) if response.status == 200 else {}
        return Hello(float(said["time"]), bool(said["known"]))
    except ssl.SSLCertVerificationError as error:
        raise RefusedError(_of_certificate(error, where)) from None
    except ssl.SSLError as error:
        raise RefusedError(f"{where} does not speak TLS ({error.reason}): ask who runs it what listens there") from None
    except socket.gaierror:
        raise UnreachableError(
            f"the name {kit.host} is not known here: ask who runs the network of this site"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        reason = str(error) or type(error).__name__
        raise UnreachableError(
            f"{where} does not answer ({reason}): it may not be started, or a firewall stands between"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise RefusedError(f"{where} is no server of ml-federated: ask who runs it what listens there") from None
    finally:
        connection.close()


def _of_certificate(error: ssl.SSLCertVerificationError, where: str) -> str:
    match error.verify_code:
        case code if code in (_HOSTNAME_MISMATCH, _IP_MISMATCH):
            return f"the certificate of {where} is made for another name: make kits with the --address that sites use"
        case code if code == _EXPIRED:
            return f"the certificate of {where} has expired: ask who runs it for a new kit"
        case code if code == _NOT_YET_VALID:
            return f"the certificate of {where} is not valid yet: set the clock of this machine"
    return f"{where} is not the one of this kit ({error.verify_message}): ask who runs it for the kit again"
