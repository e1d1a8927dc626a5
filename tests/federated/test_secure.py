"""The server gets the sum, whoever drops out when; what is changed, swapped, replayed or asked twice is refused."""

from collections.abc import Mapping, Sequence
from math import fsum
from typing import Any

import numpy as np
import pytest
import sympy
from Crypto.Cipher import ChaCha20
from Crypto.Hash import SHA256
from Crypto.Protocol.KDF import HKDF
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy import stats

from ml_src.core.errors import TrainingError
from ml_src.core.federated.secure import (
    Collector,
    Participant,
    SecureError,
    decode,
    decode_counts,
    encode,
    encode_counts,
)
from ml_src.core.federated.secure.masks import CHUNK, add_own_mask
from ml_src.core.federated.secure.messages import Context, Kind, Roster, joined, pack
from ml_src.core.federated.secure.shamir import PRIME, join, split

Vector = NDArray[np.uint64]
NAMES = ["lyon", "oslo", "pisa", "turku"]
HEADER = 33  # bytes of kind and digest


class Round:
    """A round of real sites and a real server; `gone` maps a site to the last phase that it answered."""

    def __init__(self, names: Sequence[str] = NAMES, threshold: int = 3, session: str = "s", number: int = 1) -> None:
        self.sites = {name: Participant(name, session, number, threshold) for name in names}
        self.collector = Collector(session, number, threshold)
        self.threshold = threshold

    def advertise(self) -> "Round":
        self.advertised = self.collector.keys({name: site.advertise() for name, site in self.sites.items()})
        return self

    def share(self, gone: Sequence[str] = ()) -> "Round":
        self.advertise()
        self.sealed = {name: site.share(self.advertised) for name, site in self.sites.items() if name not in gone}
        self.shares = self.collector.shares(self.sealed)
        return self

    def mask(self, vectors: Mapping[str, Vector], gone: Mapping[str, str] | None = None) -> "Round":
        gone = gone or {}
        self.share([name for name, last in gone.items() if last == "advertise"])
        senders = [name for name in self.shares if gone.get(name) != "share"]
        self.masked = {name: self.sites[name].mask(vectors[name], self.shares[name]) for name in senders}
        return self

    def total(self, vectors: Mapping[str, Vector], gone: Mapping[str, str] | None = None) -> Vector:
        self.mask(vectors, gone)
        revealing = [name for name in self.masked if name not in (gone or {})]
        self.revealed = {name: self.sites[name].reveal(list(self.masked)) for name in revealing}
        return self.collector.total(self.masked, self.revealed)


def vectors_of(names: Sequence[str], size: int = 50) -> dict[str, Vector]:
    rng = np.random.default_rng(3)
    return {name: rng.integers(0, 2**64, size, np.uint64) for name in names}


def plain_sum(vectors: Sequence[Vector]) -> list[int]:
    return [sum(column) % 2**64 for column in zip(*(vector.tolist() for vector in vectors), strict=True)]


def flipped(message: bytes, position: int) -> bytes:
    changed = bytearray(message)
    changed[position] ^= 1
    return bytes(changed)


# The sum


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, 2 * CHUNK + 3])
def test_the_masks_cancel_in_vectors_of_any_length(size: int) -> None:
    vectors = vectors_of(NAMES, size)
    assert Round().total(vectors).tolist() == plain_sum(list(vectors.values()))


@pytest.mark.parametrize("last", ["none", "advertise", "share", "mask"])
@pytest.mark.parametrize("name", NAMES)
def test_a_site_that_drops_out_after_any_phase_counts_if_its_vector_arrived(name: str, last: str) -> None:
    vectors = vectors_of(NAMES)
    gone = {} if last == "none" else {name: last}
    total = Round().total(vectors, gone)
    assert total.tolist() == plain_sum([v for site, v in vectors.items() if gone.get(site) in (None, "mask")])


def test_sites_may_drop_out_in_every_phase_of_one_round() -> None:
    names = list("abcdefg")
    vectors = vectors_of(names)
    total = Round(names, threshold=4).total(vectors, {"a": "advertise", "d": "share", "g": "mask"})
    assert total.tolist() == plain_sum([vectors[name] for name in "bcefg"])


def test_the_order_of_arrival_makes_no_difference() -> None:
    """Each message box is turned round before it is read."""

    def turned(parts: Mapping[str, Any]) -> dict[str, Any]:
        return {name: turned(part) if isinstance(part, dict) else part for name, part in reversed(list(parts.items()))}

    vectors = vectors_of(NAMES)
    sites = {name: Participant(name, "s", 1, 3) for name in NAMES}
    collector = Collector("s", 1, 3)
    advertised = turned(collector.keys(turned({name: site.advertise() for name, site in sites.items()})))
    shares = turned(collector.shares(turned({name: site.share(advertised) for name, site in sites.items()})))
    masked = turned({name: sites[name].mask(vectors[name], shares[name]) for name in NAMES if name != "oslo"})
    revealed = turned({name: sites[name].reveal(sorted(masked)[::-1]) for name in masked})
    total = collector.total(masked, revealed)
    assert total.tolist() == plain_sum([vectors[name] for name in NAMES if name != "oslo"])


@given(seed=st.integers(0, 2**32), magnitude=st.integers(-30, 30), excess=st.floats(1, 1e4))
def test_sums_of_numbers_are_right_to_a_millionth_of_the_largest(seed: int, magnitude: int, excess: float) -> None:
    values = np.random.default_rng(seed).normal(size=(4, 100)) * 10.0**magnitude
    bound = float(np.abs(values).max()) * excess
    vectors = {name: encode(row, bound, 4) for name, row in zip(NAMES, values, strict=True)}
    total = decode(Round().total(vectors, {"pisa": "share"}), bound, 4)
    plain = values[[0, 1, 3]].sum(0)
    assert np.abs(total - plain).max() <= 1e-6 * np.abs(plain).max()


@given(
    values=arrays(np.float64, st.tuples(st.integers(1, 20), st.just(6)), elements=st.floats(-1e9, 1e9)),
    spare=st.integers(0, 5),
    excess=st.floats(1, 1e12),
)
def test_a_sum_of_codes_is_off_by_no_more_than_the_resolution_says(
    values: NDArray[np.float64], spare: int, excess: float
) -> None:
    num_sites = len(values) + spare
    bound = max(float(np.abs(values).max()), 1e-300) * excess
    total = np.sum([encode(row, bound, num_sites) for row in values], axis=0, dtype=np.uint64)
    for value, column in zip(decode(total, bound, num_sites).tolist(), values.T.tolist(), strict=True):
        plain = fsum(column)
        assert abs(value - plain) <= num_sites**2 * bound * 2.0**-62 + abs(plain) * 2.0**-52


@given(num_sites=st.integers(1, 1000), bound=st.floats(1e-300, 1e300))
def test_the_largest_sum_does_not_overflow(num_sites: int, bound: float) -> None:
    for value in (bound, -bound):
        code = encode(np.array([value]), bound, num_sites)
        total = decode(np.multiply(code, np.uint64(num_sites)), bound, num_sites)
        assert total[0] == pytest.approx(num_sites * value, rel=1e-15)


def test_numbers_of_half_the_precision_are_encoded_as_what_they_are() -> None:
    values = np.array([0.1, -3.25, 1e-5], np.float32)
    assert decode(encode(values, 4, 16), 4, 16).tolist() == values.astype(float).tolist()


@given(counts=arrays(np.int64, (4, 5), elements=st.integers(-(2**53), 2**53)))
def test_counts_are_summed_exactly(counts: NDArray[np.int64]) -> None:
    vectors = {name: encode_counts(row, 4) for name, row in zip(NAMES, counts, strict=True)}
    assert decode_counts(Round().total(vectors)).tolist() == counts.sum(0).tolist()


@pytest.mark.parametrize("value", [1.0000001, -1.0000001, np.inf, np.nan])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_value_beyond_the_bound_is_refused_and_never_wraps(value: float, dtype: type) -> None:
    values = np.zeros(CHUNK + 2, dtype)
    values[-1] = value
    with pytest.raises(SecureError, match="beyond the bound 1 of secure aggregation: raise the bound"):
        encode(values, 1, 3)


@pytest.mark.parametrize("bound", [0.0, -1.0, np.inf, np.nan])
def test_a_bound_is_a_number_above_zero(bound: float) -> None:
    with pytest.raises(SecureError, match="must be a number above 0"):
        encode(np.zeros(2), bound, 3)


def test_counts_that_could_overflow_are_refused() -> None:
    for count in (2**61, -(2**61)):
        with pytest.raises(SecureError, match="the largest that 3 sites can sum up"):
            encode_counts(np.array([count]), 3)
    assert decode_counts(encode_counts(np.array([2**62]), 1)).tolist() == [2**62]


def test_a_sum_that_no_sites_can_have_sent_is_refused() -> None:
    noise = vectors_of(["x"])["x"]
    with pytest.raises(SecureError, match="one of them sent another vector"):
        decode(noise, 1, 3)
    with pytest.raises(SecureError, match="one of them sent another vector"):
        decode_counts(noise)


# What the server sees


def test_a_masked_vector_of_zeros_looks_like_uniform_bytes() -> None:
    """Chi-square over the 256 values of a byte; wrong once in a thousand million runs."""
    vectors = dict.fromkeys(NAMES, np.zeros(2**15, np.uint64))
    masked = Round().mask(vectors).masked
    for vector in [*masked.values(), masked["lyon"] - masked["oslo"], masked["lyon"] + masked["oslo"]]:
        assert stats.chisquare(np.bincount(vector.view(np.uint8), minlength=256)).pvalue > 1e-9


def test_all_masks_are_new_in_every_round() -> None:
    vectors = dict.fromkeys(NAMES, np.zeros(10, np.uint64))
    rounds = [Round(number=1), Round(number=1), Round(number=2), Round(session="t")]
    masks = {value for one in rounds for vector in one.mask(vectors).masked.values() for value in vector.tolist()}
    assert len(masks) == 4 * 4 * 10


def test_a_mask_is_what_other_implementations_of_hkdf_and_chacha20_give() -> None:
    one = Round().advertise()
    roster = Roster(one.advertised, Context("s", 1, 3))
    seed, size = bytes(range(32)), CHUNK + 7
    total = np.zeros(size, np.uint64)
    add_own_mask(total, seed, roster, "oslo")
    key = HKDF(seed, 32, roster.digest, SHA256, context=joined(b"own mask", b"oslo"))
    stream = ChaCha20.new(key=key, nonce=bytes(12)).encrypt(bytes(8 * size))
    assert total.tolist() == np.frombuffer(stream, "<u8").tolist()


def test_a_site_reveals_one_of_two_shares_of_each_site_and_only_once() -> None:
    one = Round()
    one.total(vectors_of(NAMES), {"oslo": "share"})
    for name, parts in one.revealed.items():
        kinds = {owner: message[0] for owner, message in parts.items()}
        assert kinds == {
            "lyon": Kind.SEED_SHARE,
            "oslo": Kind.KEY_SHARE,
            "pisa": Kind.SEED_SHARE,
            "turku": Kind.SEED_SHARE,
        }
        with pytest.raises(SecureError, match=f"{name} was asked to reveal, but is to nothing more in this round"):
            one.sites[name].reveal(NAMES)


def test_a_vector_that_came_too_late_cannot_be_added() -> None:
    one, vectors = Round(), vectors_of(NAMES)
    one.total(vectors, {"oslo": "share"})
    late = one.sites["oslo"].mask(vectors["oslo"], one.shares["oslo"])
    with pytest.raises(SecureError, match="sent another message than the one that was due"):
        one.collector.total({**one.masked, "oslo": late}, one.revealed)


# Too few, unknown, doubled


def test_two_sites_are_too_few() -> None:
    with pytest.raises(SecureError, match="takes 3 sites at least, and only 2 are there"):
        Round(NAMES[:2], threshold=2).advertise()


@pytest.mark.parametrize(("num_sites", "threshold"), [(3, 1), (4, 2), (6, 3)])
def test_a_threshold_that_is_no_majority_is_refused(num_sites: int, threshold: int) -> None:
    names = list("abcdefg")[:num_sites]
    sites = {name: Participant(name, "s", 1, threshold) for name in names}
    advertised = {name: site.advertise() for name, site in sites.items()}
    for take in (Collector("s", 1, threshold).keys, sites["a"].share):
        with pytest.raises(SecureError, match=f"set the threshold to {threshold + 1} or more"):
            take(advertised)


def test_fewer_sites_than_the_threshold_end_each_phase_with_a_sentence() -> None:
    vectors = vectors_of(NAMES)
    with pytest.raises(SecureError, match="only 3 sites have advertised keys, and 4 are needed"):
        Round(NAMES[:3], threshold=4).advertise()
    with pytest.raises(SecureError, match="only 2 sites have sent shares, and 3 are needed"):
        Round().share(["lyon", "oslo"])
    one = Round().share()
    with pytest.raises(SecureError, match="only 2 sites have sent shares, and 3 are needed"):
        one.sites["pisa"].mask(vectors["pisa"], {"oslo": one.shares["pisa"]["oslo"]})
    one = Round()
    with pytest.raises(SecureError, match="only 2 sites have sent masked vectors, and 3 are needed"):
        one.mask(vectors).sites["lyon"].reveal(["lyon", "oslo"])
    with pytest.raises(SecureError, match="only 2 sites have sent masked vectors, and 3 are needed"):
        one.collector.total({name: one.masked[name] for name in NAMES[:2]}, {})
    with pytest.raises(SecureError, match="only 2 sites have revealed shares, and 3 are needed"):
        Round().total(vectors, {"lyon": "mask", "oslo": "mask"})


def test_too_few_shares_can_be_followed_by_enough() -> None:
    one, vectors = Round(), vectors_of(NAMES)
    total = one.total(vectors)
    few = {name: one.revealed[name] for name in NAMES[:2]}
    with pytest.raises(SecureError, match="only 2 sites have revealed"):
        one.collector.total(one.masked, few)
    again = one.collector.total(one.masked, {**few, "turku": one.revealed["turku"]})
    assert again.tolist() == total.tolist()


def test_a_list_of_survivors_must_be_one_of_sites_that_sent_shares() -> None:
    for survivors in (["lyon", "oslo", "pisa", "pisa"], ["lyon", "oslo", "pisa", "mallory"]):
        with pytest.raises(SecureError, match="names sites twice, or such as sent no shares"):
            Round().mask(vectors_of(NAMES)).sites["lyon"].reveal(survivors)
    with pytest.raises(SecureError, match="the masked vector of lyon did not arrive"):
        Round().mask(vectors_of(NAMES)).sites["lyon"].reveal(NAMES[1:])


def test_a_key_that_two_sites_advertise_is_refused() -> None:
    one = Round().advertise()
    doubled = {**one.advertised, "oslo": one.advertised["pisa"]}
    for take in (one.collector.keys, one.sites["lyon"].share):
        with pytest.raises(SecureError, match="two sites advertised the same key"):
            take(doubled)


def test_a_key_that_everyone_can_compute_is_refused() -> None:
    one = Round().advertise()
    weak = pack(Kind.KEYS, Context("s", 1, 3).digest, bytes(32) + bytes([9] * 64))
    with pytest.raises(SecureError, match="oslo advertised a key that everyone can compute"):
        one.sites["lyon"].share({**one.advertised, "oslo": weak})


def test_vectors_of_other_types_or_lengths_are_refused() -> None:
    one, vectors = Round().share(), vectors_of(NAMES)
    with pytest.raises(SecureError, match=r"the vector of lyon is float64 of shape \(3,\): it must be uint64"):
        one.sites["lyon"].mask(np.zeros(3), one.shares["lyon"])
    with pytest.raises(SecureError, match=r"uint64 of shape \(3, 1\)"):
        one.sites["oslo"].mask(np.zeros((3, 1), np.uint64), one.shares["oslo"])
    with pytest.raises(SecureError, match=r"differ in length \(lyon 49, oslo 50, pisa 50, turku 50\)"):
        Round().total({**vectors, "lyon": vectors["lyon"][1:]})


def test_the_server_names_who_sent_or_revealed_a_part_only() -> None:
    one, vectors = Round(), vectors_of(NAMES)
    one.total(vectors)
    cut = {**one.sealed, "pisa": {"lyon": one.sealed["pisa"]["lyon"]}}
    with pytest.raises(SecureError, match="pisa has not sent shares to every other site"):
        one.collector.shares(cut)
    with pytest.raises(SecureError, match="pisa has not revealed a share of every site"):
        one.collector.total(one.masked, {**one.revealed, "pisa": {}})
    for masked, revealed in (
        ({**one.masked, "mallory": vectors["lyon"]}, one.revealed),
        (one.masked, {**one.revealed, "mallory": one.revealed["lyon"]}),
    ):
        with pytest.raises(SecureError, match="mallory takes part no longer"):
            one.collector.total(masked, revealed)


# Changed, swapped, replayed, out of turn


@given(position=st.integers(0, HEADER + 12 + 66 + 16 - 1))
def test_sealed_shares_with_one_bit_changed_are_refused(position: int) -> None:
    one = Round().share()
    shares = one.shares["pisa"]
    assert len(shares["oslo"]) == HEADER + 12 + 66 + 16
    with pytest.raises(SecureError, match="oslo"):
        one.sites["pisa"].mask(vectors_of(["x"])["x"], {**shares, "oslo": flipped(shares["oslo"], position)})


@pytest.mark.parametrize("length", [0, 1, HEADER, HEADER + 11, HEADER + 12, HEADER + 93])
def test_messages_that_are_cut_off_are_refused(length: int) -> None:
    one = Round().share()
    with pytest.raises(SecureError, match="oslo"):
        one.sites["pisa"].mask(
            vectors_of(["x"])["x"], {**one.shares["pisa"], "oslo": one.shares["pisa"]["oslo"][:length]}
        )
    with pytest.raises(SecureError, match="oslo"):
        one.collector.keys({**one.advertised, "oslo": one.advertised["oslo"][:length]})


def test_shares_under_another_sender_or_for_another_receiver_are_refused() -> None:
    one, vector = Round().share(), vectors_of(["x"])["x"]
    shares = one.shares["pisa"]
    with pytest.raises(SecureError, match="the shares of lyon were changed on the way to pisa"):
        one.sites["pisa"].mask(vector, {**shares, "lyon": shares["oslo"], "oslo": shares["lyon"]})
    with pytest.raises(SecureError, match="the shares of oslo were changed on the way to turku"):
        one.sites["turku"].mask(vector, {**one.shares["turku"], "oslo": shares["oslo"]})
    with pytest.raises(SecureError, match="mallory has no shares to send to lyon"):
        one.sites["lyon"].mask(vector, {**one.shares["lyon"], "mallory": shares["oslo"]})
    with pytest.raises(SecureError, match="oslo has no shares to send to oslo"):
        one.sites["oslo"].mask(vector, {**one.shares["oslo"], "oslo": shares["oslo"]})


def test_a_site_notices_that_its_own_keys_were_changed_or_left_out() -> None:
    for change in ({"lyon": b""}, {"lyon": Participant("lyon", "s", 1, 3).advertise()}):
        one = Round().advertise()
        with pytest.raises(SecureError, match="does not pass on the keys that lyon sent"):
            one.sites["lyon"].share({**one.advertised, **change})
    one = Round().advertise()
    with pytest.raises(SecureError, match="does not pass on"):
        one.sites["lyon"].share({name: one.advertised[name] for name in NAMES[1:]})


def test_sites_that_were_told_different_keys_do_not_open_each_others_shares() -> None:
    """The server puts other keys in the place of turku's, for lyon alone."""
    one = Round().advertise()
    false = {**one.advertised, "turku": Participant("turku", "s", 1, 3).advertise()}
    one.sealed = {name: site.share(false if name == "lyon" else one.advertised) for name, site in one.sites.items()}
    shares = one.collector.shares(one.sealed)
    with pytest.raises(SecureError, match="a message of lyon is not of this session and round"):
        one.sites["oslo"].mask(vectors_of(["x"])["x"], shares["oslo"])


@pytest.mark.parametrize(
    ("session", "number", "threshold"), [("s", 2, 3), ("t", 1, 3), ("s", 1, 4)], ids=["round", "session", "threshold"]
)
def test_messages_of_another_round_or_session_are_refused(session: str, number: int, threshold: int) -> None:
    """In each phase, a message of the very same site is replayed."""
    vectors = vectors_of(NAMES)
    old, new = Round(threshold=threshold, session=session, number=number), Round()
    old.total(vectors)
    new.total(vectors)
    sentence = "a message of oslo is not of this session and round"
    fresh = Round().share()
    with pytest.raises(SecureError, match=sentence):
        Round().collector.keys({**fresh.advertised, "oslo": old.advertised["oslo"]})
    with pytest.raises(SecureError, match=sentence):
        fresh.sites["lyon"].mask(vectors["lyon"], {**fresh.shares["lyon"], "oslo": old.shares["lyon"]["oslo"]})
    with pytest.raises(SecureError, match=sentence):
        new.collector.total(new.masked, {**new.revealed, "oslo": old.revealed["oslo"]})
    begun = Round().advertise()
    with pytest.raises(SecureError, match=sentence):
        begun.sites["lyon"].share({**begun.advertised, "oslo": old.advertised["oslo"]})


def test_messages_of_the_same_round_begun_again_are_refused() -> None:
    vector = vectors_of(["x"])["x"]
    first, second = Round().share(), Round().share()
    with pytest.raises(SecureError, match="a message of oslo is not of this session and round"):
        second.sites["lyon"].mask(vector, {**second.shares["lyon"], "oslo": first.shares["lyon"]["oslo"]})


@pytest.mark.parametrize("gone", [{}, {"oslo": "share"}], ids=["seed", "key"])
def test_a_wrong_share_fails_the_round_instead_of_the_sum(gone: dict[str, str]) -> None:
    one = Round()
    one.total(vectors_of(NAMES), gone)
    for position in (HEADER + 8, HEADER + 16, HEADER + 24):  # the first and last bits of a key of X25519 mean nothing
        parts = {**one.revealed["lyon"], "oslo": flipped(one.revealed["lyon"]["oslo"], position)}
        with pytest.raises(SecureError, match="the revealed shares of oslo do not fit together"):
            one.collector.total(one.masked, {**one.revealed, "lyon": parts})
    parts = {**one.revealed["lyon"], "oslo": one.revealed["lyon"]["oslo"][:-1]}
    with pytest.raises(SecureError, match="the revealed shares of oslo do not fit together"):
        one.collector.total(one.masked, {**one.revealed, "lyon": parts})


def test_phases_are_not_skipped_or_repeated() -> None:
    vectors = vectors_of(NAMES)
    one = Round()
    lyon = one.sites["lyon"]
    with pytest.raises(SecureError, match="lyon was asked to share, but is to advertise in this round"):
        lyon.share({})
    one.share()
    with pytest.raises(SecureError, match="lyon was asked to reveal, but is to mask"):
        lyon.reveal(NAMES)
    with pytest.raises(SecureError, match="lyon was asked to share, but is to mask"):
        lyon.share(one.advertised)
    lyon.mask(vectors["lyon"], one.shares["lyon"])
    with pytest.raises(SecureError, match="lyon was asked to mask, but is to reveal"):
        lyon.mask(vectors["lyon"], one.shares["lyon"])


def test_after_a_refusal_a_site_gives_nothing_more_in_this_round() -> None:
    one = Round().mask(vectors_of(NAMES))
    with pytest.raises(SecureError, match="did not arrive"):
        one.sites["lyon"].reveal(["oslo", "pisa", "turku"])
    with pytest.raises(SecureError, match="is to nothing more"):
        one.sites["lyon"].reveal(NAMES)


def test_the_error_is_one_that_ends_training_with_a_sentence() -> None:
    assert issubclass(SecureError, TrainingError)


# Signatures


@pytest.fixture(scope="module")
def kits() -> dict[str, ec.EllipticCurvePrivateKey]:
    return {name: ec.generate_private_key(ec.SECP384R1()) for name in [*NAMES, "mallory"]}


def signed(
    name: str, kits: Mapping[str, ec.EllipticCurvePrivateKey], number: int = 1, key: str | None = None
) -> Participant:
    peers = {other: kits[other].public_key() for other in NAMES if other != name}
    return Participant(name, "s", number, 3, kits[key or name], peers)


def test_signed_rounds_give_the_sum(kits: dict[str, ec.EllipticCurvePrivateKey]) -> None:
    one, vectors = Round(), vectors_of(NAMES)
    one.sites = {name: signed(name, kits) for name in NAMES}
    assert one.total(vectors, {"turku": "share"}).tolist() == plain_sum([vectors[name] for name in NAMES[:3]])


def test_keys_that_are_not_signed_by_their_site_for_this_round_are_refused(
    kits: dict[str, ec.EllipticCurvePrivateKey],
) -> None:
    advertised = {name: signed(name, kits).advertise() for name in NAMES}
    other_keys = signed("oslo", kits).advertise()
    digest = Context("s", 1, 3).digest
    wrong = {
        "unsigned": Participant("oslo", "s", 1, 3).advertise(),
        "signed by another": signed("oslo", kits, key="mallory").advertise(),
        "signed under another name": signed("pisa", kits, key="oslo").advertise(),
        "signed for another round": pack(Kind.KEYS, digest, signed("oslo", kits, number=2).advertise()[HEADER:]),
        "with a signature of other keys": advertised["oslo"][: HEADER + 96] + other_keys[HEADER + 96 :],
        "with another commitment": flipped(advertised["oslo"], HEADER + 64),
    }
    for message in wrong.values():
        lyon = signed("lyon", kits)
        with pytest.raises(SecureError, match="the keys of oslo are not signed by oslo"):
            lyon.share({**advertised, "lyon": lyon.advertise(), "oslo": message})


def test_a_site_that_is_not_in_the_kit_is_refused(kits: dict[str, ec.EllipticCurvePrivateKey]) -> None:
    lyon = signed("lyon", kits)
    advertised = {name: signed(name, kits).advertise() for name in [*NAMES, "mallory"]}
    with pytest.raises(SecureError, match="mallory is not one of the sites in the kit of lyon"):
        lyon.share({**advertised, "lyon": lyon.advertise()})


def test_a_site_with_a_part_of_its_kit_does_not_start(kits: dict[str, ec.EllipticCurvePrivateKey]) -> None:
    with pytest.raises(SecureError, match="lyon has only a part of the keys of its kit"):
        Participant("lyon", "s", 1, 3, signing_key=kits["lyon"])


# Shares


def test_the_field_is_one_and_holds_every_secret() -> None:
    assert sympy.isprime(PRIME)
    assert PRIME > 2**256


@given(secret=st.binary(min_size=32, max_size=32), data=st.data())
def test_any_threshold_of_shares_gives_the_secret_back(secret: bytes, data: st.DataObject) -> None:
    num_shares = data.draw(st.integers(1, 9))
    threshold = data.draw(st.integers(1, num_shares))
    shares = dict(enumerate(split(secret, threshold, num_shares), 1))
    chosen = data.draw(st.permutations(sorted(shares)))[: data.draw(st.integers(threshold, num_shares))]
    assert join({place: shares[place] for place in chosen}) == secret


@given(secret=st.binary(min_size=32, max_size=32), guess=st.binary(min_size=32, max_size=32))
def test_one_share_less_leaves_every_secret_possible(secret: bytes, guess: bytes) -> None:
    """With two of three shares, there is a third for any secret: the one on the parabola through all three."""
    two = split(secret, 3, 3)[:2]
    at_1, at_2, at_0 = (int.from_bytes(part) for part in (*two, guess))
    third = (at_0 - 3 * at_1 + 3 * at_2) % PRIME  # third differences of a parabola are zero
    assert join({1: two[0], 2: two[1], 3: third.to_bytes(33)}) == guess


def test_shares_of_the_same_secret_are_new_each_time() -> None:
    assert not set(split(bytes(32), 2, 5)) & set(split(bytes(32), 2, 5))
