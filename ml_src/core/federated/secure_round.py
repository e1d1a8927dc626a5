"""A round in which the server sees sums only: what goes into the sum, and the phases of both sides over letters.

The vector of a site has its change of the weights, times its share of all training images, its losses, and the counts
of its validation images. Next to read: `secure/`, the masks themselves.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from numpy.typing import NDArray

from ml_src.core.federated.link import Answer
from ml_src.core.federated.secure import (
    Collector,
    Participant,
    SecureError,
    decode,
    decode_counts,
    encode,
    encode_counts,
)
from ml_src.core.federated.wire import Expected, Letter

BOUND = 2.0**20  # of any one value, before it is weighted down
MOST_SITES = 1000  # of one sum: both sides must divide the ring alike
FEWEST = 3
PHASES = ("keys", "shares", "reveal")


@dataclass(frozen=True)
class Keys:
    """Of the kits: with them the server cannot stand in for a site."""

    own: EllipticCurvePrivateKey
    others: Mapping[str, EllipticCurvePublicKey]


@dataclass
class Tally:
    """What is summed up: of one site, or of all."""

    change: NDArray[np.float64]
    """Of the weights, times the share of images, (values,); 0 where nothing was trained."""
    losses: NDArray[np.float64]
    """Of training and of validation, each times its number of images over all training images; (2,)."""
    counts: NDArray[np.int64]
    """Of the confusion matrix, then validation images, images trained on, steps taken."""

    def encoded(self) -> NDArray[np.uint64]:
        """Return it as one vector for the masks."""
        values = np.concatenate([self.change, self.losses])
        return np.concatenate([encode(values, BOUND, MOST_SITES), encode_counts(self.counts, MOST_SITES)])

    @classmethod
    def decoded(cls, total: NDArray[np.uint64], num_counts: int) -> "Tally":
        """Undo `encoded`, of a sum too."""
        values = decode(total[:-num_counts], BOUND, MOST_SITES)
        return cls(values[:-2], values[-2:], decode_counts(total[-num_counts:]))


def threshold(num_sites: int) -> int:
    """Return how many of `num_sites` must see a round through: two thirds, so that no site can be singled out."""
    return math.ceil(2 * num_sites / 3)


def context(letter: Letter, shared: Mapping[str, Any]) -> str:
    """Return what all sites of a sum must have been told alike: else their masks do not go together.

    A server that tells sites different weights, or different numbers of images to weigh by, could read one of them.
    """
    digest = hashlib.sha256(json.dumps([letter.kind, letter.values.get("num_sites"), shared], sort_keys=True).encode())
    for name in sorted(letter.arrays):
        digest.update(letter.arrays[name].tobytes())
    return f"{letter.session} {digest.hexdigest()}"


def require_enough(letter: Letter) -> None:
    """Raise SecureError where so few sites are asked that their sum would tell of single ones: before any work."""
    number = letter.values.get("num_sites")
    if not isinstance(number, int) or not FEWEST <= number <= MOST_SITES:
        raise SecureError(f"secure aggregation needs {FEWEST} sites at least: their sum would tell a single one")


class Masking:
    """A site's side, from its tally to its shares of the others' masks."""

    def __init__(
        self,
        name: str,
        letter: Letter,
        shared: Mapping[str, Any],
        tally: Tally,
        keys: Keys | None,
        before: Sequence[str] | None,
    ) -> None:
        """Prepare.

        Args:
            name: of the site.
            letter: the one that asked for work; see `require_enough`.
            shared: what this site was told of all sites.
            tally: what it adds.
            keys: of its kit, where it is a real site.
            before: who was in the sum of this very round when it was summed up before, if it was.
        """
        own, others = (None, None) if keys is None else (keys.own, keys.others)
        least = threshold(letter.values["num_sites"])
        self.participant = Participant(name, context(letter, shared), letter.round, least, own, others)
        self.before = before
        self.name, self.about, self.vector = name, (letter.session, letter.round), tally.encoded()

    def begin(self, letter: Letter, values: dict[str, Any]) -> Letter:
        """Answer the letter that asked for work."""
        return letter.answer(values=values, sealed={self.name: self.participant.advertise()})

    def answer(self, letter: Letter) -> Letter:
        """Answer a later phase.

        Raises: SecureError for one of another round, and as `Participant`.
        """
        if (letter.session, letter.round) != self.about:
            raise SecureError(f"round {letter.round} is not the one that is being summed up: refused")
        match letter.kind:
            case "keys":
                return letter.answer(sealed=self.participant.share(letter.sealed))
            case "shares":
                return letter.answer({"masked": self.participant.mask(self.vector, letter.sealed)})
            case _:
                survivors = letter.values.get("survivors")
                if not (isinstance(survivors, list) and all(isinstance(name, str) for name in survivors)):
                    raise SecureError("the names of the sites that answered are missing")
                if self.before is not None and sorted(survivors) != sorted(self.before):
                    raise SecureError(
                        f"round {letter.round} was summed up before, over other sites: the difference of both sums "
                        "would show what single sites have sent"
                    )
                return letter.answer(sealed=self.participant.reveal(survivors))


Ask = Callable[[Mapping[str, Letter], Mapping[str, Mapping[str, Expected]]], list[tuple[Answer, Letter]]]


def secure_sum(
    ask: Ask,
    asked: Letter,
    shared: Mapping[str, Any],
    opened: list[tuple[Answer, Letter]],
    least: int,
    num_values: int,
    num_counts: int,
) -> tuple[Tally, list[str]]:
    """Return the sum of the sites' tallies, and whose are in it: the server's side.

    Args:
        ask: sends letters and returns the usable answers.
        asked: the letter that they answer.
        shared: what all sites were told of all.
        opened: the answers that have the sites' keys.
        least: how many must be in the sum; with fewer, no mask is taken off.
        num_values: weights in a tally.
        num_counts: counts in it.

    Raises: SecureError where too few sites see it through.
    """
    if not opened:
        raise SecureError("no site sent its keys")
    collector = Collector(context(asked, shared), asked.round, threshold(asked.values["num_sites"]))

    def letter(kind: str, **parts: Any) -> Letter:
        return Letter(kind, asked.session, asked.round, **parts)

    advertised = collector.keys({a.site: one.sealed[a.site] for a, one in opened if a.site in one.sealed})
    told = ask({site: letter("keys", sealed=dict(advertised)) for site in advertised}, {"keys": {}})
    routed = collector.shares({a.site: one.sealed for a, one in told})
    expected = {"shares": {"masked": Expected("uint64", (num_values + 2 + num_counts,))}}
    told = ask({site: letter("shares", sealed=dict(routed[site])) for site in routed}, expected)
    masked = {a.site: one.arrays["masked"] for a, one in told}
    survivors = sorted(masked)
    if len(survivors) < least:
        raise SecureError(f"only {len(survivors)} sites sent what is summed up, {least} are needed")
    told = ask({site: letter("reveal", values={"survivors": survivors}) for site in survivors}, {"reveal": {}})
    total = collector.total(masked, {a.site: one.sealed for a, one in told})
    return Tally.decoded(total, num_counts), survivors
