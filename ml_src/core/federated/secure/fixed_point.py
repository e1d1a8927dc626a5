"""Numbers as integers modulo 2**64, so that masks cancel to the bit and sums cannot overflow unseen."""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ml_src.core.federated.secure.messages import SecureError

LARGEST_SUM = 2**62  # half of what is left beside the sign: a sum of anything but encoded values soon exceeds it
CHUNK = 2**16  # values; what a core's cache holds


def encode(values: NDArray[np.floating], bound: float, num_sites: int) -> NDArray[np.uint64]:
    """Return values (L,) as fixed-point numbers modulo 2**64 (two's complement), to be summed over the sites.

    `bound`: the largest absolute value that may occur at any site. `num_sites`: how many vectors are summed at most.
    Values are rounded to multiples of 2**-k, where k = 62 - e and 2**(e - 1) <= num_sites * bound < 2**e, so that
    2**-k <= num_sites * bound * 2**-61. The sum of n vectors is off by n * 2**-k / 2 at most, which is no more than
    num_sites**2 * bound * 2**-62, before `decode` rounds it to float64. That is less than 1e-6 of every sum above
    num_sites**2 * bound * 2.2e-13.

    Raises: SecureError for values beyond the bound, or that are no numbers; nothing wraps or is clipped.
    """
    exponent = _exponent(bound, num_sites)
    codes = np.empty(len(values), np.int64)
    for part in _chunks(len(values)):
        largest = float(np.abs(values[part]).max())  # NumPy would round the bound to float32 before comparing
        if not largest <= bound:
            raise SecureError(
                f"a value of {largest:g} is beyond the bound {bound:g} of secure aggregation: raise the bound"
            )
        codes[part] = np.rint(np.ldexp(values[part].astype(np.float64), exponent))
    return codes.view(np.uint64)


def decode(total: NDArray[np.uint64], bound: float, num_sites: int) -> NDArray[np.float64]:
    """Return the sum of encoded vectors as numbers, (L,).

    Raises: SecureError where it is larger than sums of such vectors are.
    """
    exponent = _exponent(bound, num_sites)
    largest = num_sites * (int(math.ldexp(bound, exponent)) + 1)  # each is rounded by less than 1
    values = np.empty(len(total))
    for part in _chunks(len(total)):
        values[part] = np.ldexp(_signed(total[part], largest).astype(np.float64), -exponent)
    return values


def encode_counts(counts: NDArray[np.integer], num_sites: int) -> NDArray[np.uint64]:
    """Return integers (L,) as numbers modulo 2**64; their sum over the sites is exact.

    Raises: SecureError for numbers beyond 2**62 / num_sites, in absolute value.
    """
    largest = LARGEST_SUM // num_sites
    if len(counts) and (int(counts.max()) > largest or int(counts.min()) < -largest):
        raise SecureError(f"a count is beyond {largest}, the largest that {num_sites} sites can sum up")
    return counts.astype(np.int64, casting="same_kind").view(np.uint64)


def decode_counts(total: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the sum of encoded counts, (L,).

    Raises: SecureError where it is larger than sums of encoded counts are.
    """
    return _signed(total, LARGEST_SUM)


def _exponent(bound: float, num_sites: int) -> int:
    """Return k, where values are multiples of 2**-k."""
    largest = num_sites * bound
    if not (0 < largest < math.inf):
        raise SecureError(f"the bound {bound:g} of secure aggregation must be a number above 0")
    return LARGEST_SUM.bit_length() - 1 - math.frexp(largest)[1]


def _signed(total: NDArray[np.uint64], largest: int) -> NDArray[np.int64]:
    values = total.view(np.int64)
    if len(values) and (int(values.max()) > largest or int(values.min()) < -largest):
        raise SecureError("the sum is beyond what the sites may send: one of them sent another vector, or other bounds")
    return values


def _chunks(length: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, length, CHUNK))
