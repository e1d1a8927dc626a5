"""A secret in shares, of which `threshold` give it back and fewer tell nothing (Shamir 1979)."""

import secrets
from collections.abc import Mapping

PRIME = 2**256 + 297  # the smallest that is larger than any secret
SECRET_BYTES = 32
SHARE_BYTES = 33


def split(secret: bytes, threshold: int, num_shares: int) -> list[bytes]:
    """Return shares of 33 bytes: the values at 1, 2, ... num_shares of a random polynomial with the secret at 0.

    `secret`: 32 bytes.
    """
    coefficients = [int.from_bytes(secret), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return [_value(coefficients, x).to_bytes(SHARE_BYTES) for x in range(1, num_shares + 1)]


def join(shares: Mapping[int, bytes]) -> bytes:
    """Return the secret of 32 bytes behind at least `threshold` shares, each under its place 1, 2, ...

    Raises: ValueError where these are no shares of one secret, as far as that shows.
    """
    if any(len(share) != SHARE_BYTES for share in shares.values()):
        raise ValueError(f"a share has {SHARE_BYTES} bytes")
    secret = sum(int.from_bytes(share) * _weight(x, shares) for x, share in shares.items()) % PRIME
    if secret >= 2 ** (8 * SECRET_BYTES):
        raise ValueError("the shares are not of one secret")
    return secret.to_bytes(SECRET_BYTES)


def _value(coefficients: list[int], x: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % PRIME
    return value


def _weight(x: int, places: Mapping[int, bytes]) -> int:
    """What the share of x counts in the value at 0 (Lagrange)."""
    weight = 1
    for other in places:
        if other != x:
            weight = weight * other * pow(other - x, -1, PRIME) % PRIME
    return weight
