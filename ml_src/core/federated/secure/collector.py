"""The server's side of secure aggregation: passes messages on and takes the masks off the sum."""

from collections.abc import Container, Mapping

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from ml_src.core.federated.secure import shamir
from ml_src.core.federated.secure.masks import add_own_mask, add_pair_mask, commitment
from ml_src.core.federated.secure.messages import Context, Kind, Roster, SecureError, unpack
from ml_src.core.federated.secure.participant import check_vector


class Collector:
    """The server in one round. Which messages came first makes no difference.

    Call `keys`, `shares`, `total`, in this order. Each raises SecureError, by which nothing is lost: it can be called
    again, with what is left.
    """

    def __init__(self, session: str, round: int, threshold: int) -> None:
        self._context = Context(session, round, threshold)
        self._roster: Roster
        self._senders: list[str] = []  # of shares: they have masks with each other

    def keys(self, advertised: Mapping[str, bytes]) -> dict[str, bytes]:
        """Take what sites advertised, by name; return what each of them gets for `Participant.share`."""
        self._roster = Roster(advertised, self._context)
        return dict(advertised)

    def shares(self, sealed: Mapping[str, Mapping[str, bytes]]) -> dict[str, dict[str, bytes]]:
        """Take sealed shares, by sender and receiver; return them by receiver and sender, for `Participant.mask`.

        Sites that sent none get none: they are out of this round.
        """
        for sender, parts in sealed.items():
            self._check_known(sender, self._roster.names)
            if set(parts) != set(self._roster.names) - {sender}:
                raise SecureError(f"{sender} has not sent shares to every other site: go on without it")
        self._context.check_enough(len(sealed), "have sent shares")
        self._senders = sorted(sealed)
        return {
            receiver: {sender: sealed[sender][receiver] for sender in self._senders if sender != receiver}
            for receiver in self._senders
        }

    def total(
        self, masked: Mapping[str, NDArray[np.uint64]], revealed: Mapping[str, Mapping[str, bytes]]
    ) -> NDArray[np.uint64]:
        """Return the sum of the vectors behind `masked`, (L,), modulo 2**64.

        `masked`: by site; exactly those that were named in `Participant.reveal`. `revealed`: by who revealed, and whose
        share it is.
        """
        self._check_vectors(masked)
        self._context.check_enough(len(revealed), "have revealed shares")
        for name, parts in revealed.items():
            self._check_known(name, masked)
            if set(parts) != set(self._senders):
                raise SecureError(f"{name} has not revealed a share of every site: go on without it")
        total = np.zeros_like(next(iter(masked.values())))
        for vector in masked.values():
            total += vector
        for name in masked:
            add_own_mask(total, self._seed(name, revealed), self._roster, name, take_off=True)
        for dropped in set(self._senders) - set(masked):
            key = self._mask_key(dropped, revealed)
            for name in masked:
                add_pair_mask(total, key, self._roster, dropped, name)  # as it would have: now all of them cancel
        return total

    def _check_vectors(self, masked: Mapping[str, NDArray[np.uint64]]) -> None:
        self._context.check_enough(len(masked), "have sent masked vectors")
        for name, vector in masked.items():
            self._check_known(name, self._senders)
            check_vector(vector, name)
        if len({len(vector) for vector in masked.values()}) > 1:
            sizes = ", ".join(f"{name} {len(vector)}" for name, vector in sorted(masked.items()))
            raise SecureError(f"the sites' vectors differ in length ({sizes}): do all train the same model?")

    def _check_known(self, name: str, names: Container[str]) -> None:
        if name not in names:
            raise SecureError(f"{name} takes part no longer, for it has missed an earlier message of this round")

    def _seed(self, name: str, revealed: Mapping[str, Mapping[str, bytes]]) -> bytes:
        seed = self._secret(name, Kind.SEED_SHARE, revealed)
        if commitment(seed, self._context.digest, name) != self._roster.keys[name].commitment:
            raise _misfit(name)
        return seed

    def _mask_key(self, name: str, revealed: Mapping[str, Mapping[str, bytes]]) -> X25519PrivateKey:
        key = X25519PrivateKey.from_private_bytes(self._secret(name, Kind.KEY_SHARE, revealed))
        if key.public_key().public_bytes_raw() != self._roster.keys[name].mask_key:
            raise _misfit(name)
        return key

    def _secret(self, owner: str, kind: Kind, revealed: Mapping[str, Mapping[str, bytes]]) -> bytes:
        chosen = sorted(revealed)[: self._context.threshold]
        digest = self._roster.digest
        shares = {self._roster.places[name]: unpack(revealed[name][owner], kind, digest, name) for name in chosen}
        try:
            return shamir.join(shares)
        except ValueError as error:
            raise _misfit(owner) from error


def _misfit(name: str) -> SecureError:
    return SecureError(f"the revealed shares of {name} do not fit together: this round has no sum, train it again")
