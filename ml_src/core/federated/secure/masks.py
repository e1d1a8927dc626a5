"""From two keys, or a seed, to a mask as long as the vector: X25519, HKDF-SHA256, ChaCha20."""

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from ml_src.core.federated.secure.messages import KEY_BYTES, Roster, SecureError, joined

CHUNK = 2**16  # values of a mask that exist at a time; with zeros and sum in a core's cache
WORD = np.dtype("<u8")  # the same mask on every machine


def derive(secret: bytes, digest: bytes, purpose: str, *names: str) -> bytes:
    """Return a key of 32 bytes for one purpose between these sites (in this order), in the round behind `digest`."""
    info = joined(purpose.encode(), *(name.encode() for name in names))
    return HKDF(SHA256(), KEY_BYTES, salt=digest, info=info).derive(secret)


def commitment(seed: bytes, context: bytes, name: str) -> bytes:
    """Return 32 bytes by which a seed can be recognised, and that tell nothing of it."""
    return derive(seed, context, "commitment to a seed", name)


def seal_key(private: X25519PrivateKey, roster: Roster, other: str, sender: str, receiver: str) -> bytes:
    """Return the key that seals the shares which `sender` sends to `receiver`.

    `private`: the key for shares of one of them; `other` is the other one.
    """
    return derive(
        _agree(private, roster.keys[other].share_key, other), roster.digest, "sealed shares", sender, receiver
    )


def add_own_mask(total: NDArray[np.uint64], seed: bytes, roster: Roster, name: str, take_off: bool = False) -> None:
    """Add the mask that is a site's own to a vector, in place; or take it off."""
    _add(total, derive(seed, roster.digest, "own mask", name), take_off)


def add_pair_mask(total: NDArray[np.uint64], private: X25519PrivateKey, roster: Roster, name: str, other: str) -> None:
    """Add the mask that `name` has with `other` to a vector, in place; `other` adds its negative.

    `private`: the key for masks of `name`.
    """
    secret = _agree(private, roster.keys[other].mask_key, other)
    key = derive(secret, roster.digest, "pairwise mask", *sorted((name, other)))
    _add(total, key, negative=name > other)


def _agree(private: X25519PrivateKey, public: bytes, owner: str) -> bytes:
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:  # a point of small order: the secret would be known to all
        raise SecureError(f"{owner} advertised a key that everyone can compute: leave it out") from error


def _add(total: NDArray[np.uint64], key: bytes, negative: bool) -> None:
    """Add the stream of ChaCha20 under a key, as numbers modulo 2**64, in place.

    A key is used for one stream, so that its nonce may be zero.
    """
    stream = Cipher(ChaCha20(key, nonce=bytes(16)), mode=None).encryptor()
    zeros = bytes(CHUNK * WORD.itemsize)
    buffer = bytearray(len(zeros))
    words = np.frombuffer(buffer, WORD)
    combine = np.subtract if negative else np.add
    for start in range(0, len(total), CHUNK):
        stream.update_into(zeros, buffer)
        part = total[start : start + CHUNK]
        combine(part, words[: len(part)], out=part)
