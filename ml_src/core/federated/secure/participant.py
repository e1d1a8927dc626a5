"""A site's side of secure aggregation: one object a round, four calls in a fixed order."""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA384
from numpy.typing import NDArray

from ml_src.core.federated.secure import shamir
from ml_src.core.federated.secure.masks import add_own_mask, add_pair_mask, commitment, seal_key
from ml_src.core.federated.secure.messages import (
    Context,
    Keys,
    Kind,
    Roster,
    SecureError,
    joined,
    pack,
    signed_bytes,
    unpack,
)

NONCE_BYTES = 12
PHASES = ["advertise", "share", "mask", "reveal", "nothing more"]


class Participant:
    """One site in one round; all its secrets are fresh, and live as long as it does.

    `threshold`: how many sites must see the round through, more than half of those that advertise. `signing_key` and
    `peers`: this site's own ECDSA key and the public ones of all others, by name; both or neither.

    Every method raises SecureError, and the site is then out of this round: no phase can be repeated with other
    messages. Calling it out of turn changes nothing.
    """

    def __init__(
        self,
        name: str,
        session: str,
        round: int,
        threshold: int,
        signing_key: EllipticCurvePrivateKey | None = None,
        peers: Mapping[str, EllipticCurvePublicKey] | None = None,
    ) -> None:
        if (signing_key is None) != (peers is None):
            raise SecureError(f"{name} has only a part of the keys of its kit: signatures need its own and all others'")
        self.name = name
        self._context = Context(session, round, threshold)
        self._signing_key, self._peers = signing_key, peers
        self._share_key, self._mask_key = X25519PrivateKey.generate(), X25519PrivateKey.generate()
        self._seed = secrets.token_bytes(shamir.SECRET_BYTES)
        self._advertised = b""
        self._roster: Roster
        self._shares: dict[str, tuple[bytes, bytes]] = {}  # of seed and mask key, by whose they are
        self._next = PHASES[0]

    def advertise(self) -> bytes:
        """Return the public keys of this round, for all other sites."""
        with self._phase("advertise"):
            public = [key.public_key().public_bytes_raw() for key in (self._share_key, self._mask_key)]
            body = b"".join([*public, commitment(self._seed, self._context.digest, self.name)])
            signature = b""
            if self._signing_key is not None:
                signature = self._signing_key.sign(signed_bytes(self._context, self.name, body), ECDSA(SHA384()))
            self._advertised = pack(Kind.KEYS, self._context.digest, body + signature)
            return self._advertised

    def share(self, advertised: Mapping[str, bytes]) -> dict[str, bytes]:
        """Take what all sites advertised, this one among them; return sealed shares, by who shall get them."""
        with self._phase("share"):
            if advertised.get(self.name) != self._advertised:
                raise SecureError(f"the server does not pass on the keys that {self.name} sent: ask who runs it")
            self._roster = Roster(advertised, self._context)
            for name, keys in self._roster.keys.items():
                self._check_signature(name, keys)
            size = self._context.threshold, len(self._roster.names)
            seeds = shamir.split(self._seed, *size)
            keys_of_masks = shamir.split(self._mask_key.private_bytes_raw(), *size)
            parts = dict(zip(self._roster.names, zip(seeds, keys_of_masks, strict=True), strict=True))
            self._shares[self.name] = parts.pop(self.name)
            return {name: self._seal(name, b"".join(pair)) for name, pair in parts.items()}

    def mask(self, vector: NDArray[np.uint64], shares: Mapping[str, bytes]) -> NDArray[np.uint64]:
        """Return the masked vector, a new one.

        `vector`: (L,) numbers modulo 2**64, as `encode` gives them. `shares`: what others sealed for this site, by who
        sent it; the masks are those with them.
        """
        with self._phase("mask"):
            check_vector(vector, self.name)
            unknown = sorted(set(shares) - set(self._roster.names) | set(shares) & {self.name})
            if unknown:
                raise SecureError(f"{unknown[0]} has no shares to send to {self.name}: ask who runs the server")
            self._context.check_enough(len(shares) + 1, "have sent shares")
            for sender in sorted(shares):
                self._shares[sender] = self._open(sender, shares[sender])
            total = vector.copy()
            add_own_mask(total, self._seed, self._roster, self.name)
            for other in shares:
                add_pair_mask(total, self._mask_key, self._roster, self.name, other)
            return total

    def reveal(self, survivors: Sequence[str]) -> dict[str, bytes]:
        """Return one share of each site of this round, by whose it is.

        `survivors`: whose masked vectors have arrived. Of them it is a share of the seed of their own mask, of the
        others one of their key for masks: never both, and never again.
        """
        with self._phase("reveal"):
            if len(set(survivors)) < len(survivors) or not set(survivors) <= set(self._shares):
                raise SecureError("the server names sites twice, or such as sent no shares: ask who runs it")
            if self.name not in survivors:
                raise SecureError(f"the masked vector of {self.name} did not arrive: this round goes on without it")
            self._context.check_enough(len(survivors), "have sent masked vectors")
            revealed = {name: self._reveal(name, name in survivors) for name in sorted(self._shares)}
            self._shares.clear()
            return revealed

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Let a phase pass once, in its turn; a failure ends the participation."""
        if name != self._next:
            raise SecureError(f"{self.name} was asked to {name}, but is to {self._next} in this round")
        self._next = PHASES[-1]
        yield
        self._next = PHASES[PHASES.index(name) + 1]

    def _check_signature(self, name: str, keys: Keys) -> None:
        if self._peers is None or name == self.name:
            return
        if name not in self._peers:
            raise SecureError(
                f"{name} is not one of the sites in the kit of {self.name}: get a new kit, or ask who it is"
            )
        try:
            self._peers[name].verify(keys.signature, signed_bytes(self._context, name, keys.body), ECDSA(SHA384()))
        except InvalidSignature as error:
            raise SecureError(f"the keys of {name} are not signed by {name}: nothing is sent in this round") from error

    def _seal(self, receiver: str, shares: bytes) -> bytes:
        key = seal_key(self._share_key, self._roster, receiver, self.name, receiver)
        nonce = secrets.token_bytes(NONCE_BYTES)
        sealed = ChaCha20Poly1305(key).encrypt(nonce, shares, self._bound(self.name, receiver))
        return pack(Kind.SHARES, self._roster.digest, nonce + sealed)

    def _open(self, sender: str, message: bytes) -> tuple[bytes, bytes]:
        body = unpack(message, Kind.SHARES, self._roster.digest, sender)
        key = seal_key(self._share_key, self._roster, sender, sender, self.name)
        nonce, sealed = body[:NONCE_BYTES], body[NONCE_BYTES:]
        try:
            shares = ChaCha20Poly1305(key).decrypt(nonce, sealed, self._bound(sender, self.name))
        except (InvalidTag, ValueError) as error:  # ValueError: too short for a nonce
            raise SecureError(f"the shares of {sender} were changed on the way to {self.name}") from error
        return shares[: shamir.SHARE_BYTES], shares[shamir.SHARE_BYTES :]

    def _bound(self, sender: str, receiver: str) -> bytes:
        """What sealed shares are for; session, round and all keys are in the digest."""
        return joined(self._roster.digest, sender.encode(), receiver.encode())

    def _reveal(self, name: str, survived: bool) -> bytes:
        seed, key = self._shares[name]
        return pack(Kind.SEED_SHARE if survived else Kind.KEY_SHARE, self._roster.digest, seed if survived else key)


def check_vector(vector: NDArray[np.uint64], name: str) -> None:
    """Raise SecureError where the vector of a site is not one of numbers modulo 2**64."""
    if vector.dtype != np.uint64 or vector.ndim != 1:
        raise SecureError(
            f"the vector of {name} is {vector.dtype} of shape {vector.shape}: it must be uint64, (length,)"
        )
