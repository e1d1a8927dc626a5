"""What crosses in secure aggregation, as bytes of a fixed layout, and what binds it to one round.

A message is its kind (1 byte), a digest (32) and a body:

    kind        digest of    body
    KEYS        the context  key for shares (32), key for masks (32), commitment (32), signature or nothing
    SHARES      the roster   nonce (12), and sealed: share of the seed (33), share of the key for masks (33), tag (16)
    SEED_SHARE  the roster   share (33)
    KEY_SHARE   the roster   share (33)
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from ml_src.core.errors import TrainingError

DIGEST_BYTES = 32
KEY_BYTES = 32
LEAST_SITES = 3
"""Of two sites each knows the other's vector from the sum."""


class SecureError(TrainingError):
    """Secure aggregation cannot go on; nothing more was given away."""


class Kind(IntEnum):
    """The first byte of a message."""

    KEYS = 1
    SHARES = 2
    SEED_SHARE = 3
    KEY_SHARE = 4


def joined(*parts: bytes) -> bytes:
    """Return parts with their lengths before them, so that no two lists of parts give the same bytes."""
    return b"".join(len(part).to_bytes(8) + part for part in parts)


def pack(kind: Kind, digest: bytes, body: bytes) -> bytes:
    """Return a message."""
    return bytes([kind]) + digest + body


def unpack(message: bytes, kind: Kind, digest: bytes, sender: str) -> bytes:
    """Return the body of a message.

    Raises: SecureError where it is of another kind, session, round, threshold or, after the first phase, set of keys.
    """
    if message[:1] != bytes([kind]):
        raise SecureError(f"{sender} sent another message than the one that was due: it is not used")
    if message[1 : 1 + DIGEST_BYTES] != digest:
        raise SecureError(f"a message of {sender} is not of this session and round: it is not used")
    return message[1 + DIGEST_BYTES :]


@dataclass(frozen=True)
class Context:
    """What all sites of a round must agree on beforehand."""

    session: str
    round: int
    threshold: int

    @property
    def digest(self) -> bytes:
        """Its SHA-256."""
        parts = ["ml_src secure aggregation 1", self.session, str(self.round), str(self.threshold)]
        return hashlib.sha256(joined(*(part.encode() for part in parts))).digest()

    def check_enough(self, num_sites: int, what: str) -> None:
        """Raise SecureError where fewer sites than the threshold have done something."""
        if num_sites < self.threshold:
            raise SecureError(f"only {num_sites} sites {what}, and {self.threshold} are needed for a sum")


@dataclass(frozen=True)
class Keys:
    """What a site advertises."""

    share_key: bytes
    mask_key: bytes
    commitment: bytes  # to the seed of its own mask: a wrong share shows
    signature: bytes  # empty where there is none

    @property
    def body(self) -> bytes:
        """The part of the message that is signed."""
        return self.share_key + self.mask_key + self.commitment


def signed_bytes(context: Context, name: str, body: bytes) -> bytes:
    """Return what a site signs: its keys, for one round and name.

    The first part keeps it apart from all else that is signed by the same key.
    """
    return joined(b"ml_src secure aggregation keys", context.digest, name.encode(), body)


class Roster:
    """The sites that advertised keys; the same for all who were told the same.

    Raises: SecureError for messages that are none, too few sites, too small a threshold, keys that occur twice.
    """

    def __init__(self, advertised: Mapping[str, bytes], context: Context) -> None:
        _check_number(len(advertised), context.threshold)
        context.check_enough(len(advertised), "have advertised keys")
        self.names = sorted(advertised)
        self.keys = {name: _read_keys(name, advertised[name], context) for name in self.names}
        public = [key for keys in self.keys.values() for key in (keys.share_key, keys.mask_key)]
        if len(set(public)) < len(public):
            raise SecureError("two sites advertised the same key: is one of them a copy of the other?")
        parts = [part for name in self.names for part in (name.encode(), advertised[name])]
        self.digest = hashlib.sha256(joined(context.digest, *parts)).digest()
        self.places = {name: place for place, name in enumerate(self.names, 1)}  # of its shares


def _check_number(num_sites: int, threshold: int) -> None:
    if num_sites < LEAST_SITES:
        raise SecureError(f"secure aggregation takes {LEAST_SITES} sites at least, and only {num_sites} are there")
    if 2 * threshold <= num_sites:
        raise SecureError(
            f"{threshold} of {num_sites} sites are no majority, and could be asked for one secret while the others are "
            f"asked for its counterpart: set the threshold to {num_sites // 2 + 1} or more"
        )


def _read_keys(name: str, message: bytes, context: Context) -> Keys:
    body = unpack(message, Kind.KEYS, context.digest, name)
    if len(body) < 3 * KEY_BYTES:
        raise SecureError(f"the keys of {name} are cut off: they are not used")
    share_key, mask_key, committed = (body[start : start + KEY_BYTES] for start in range(0, 3 * KEY_BYTES, KEY_BYTES))
    return Keys(share_key, mask_key, committed, signature=body[3 * KEY_BYTES :])
