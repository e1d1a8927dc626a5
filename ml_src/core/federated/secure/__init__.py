"""Secure aggregation: the server learns the sum of the sites' vectors, and no single one (Bonawitz et al. 2017).

"Practical secure aggregation for privacy-preserving machine learning", CCS 2017, with double masking. Each site hides
its vector under a mask of its own and one with each other site, which cancel in the sum. A round has four phases:

    advertise   a site sends two public keys, one for shares and one for masks     -> Collector.keys
    share       a site sends Shamir shares of its two secrets, sealed, to each     -> Collector.shares
    mask        a site sends its vector, masked                                    -> the sites of whom it arrived
    reveal      a site sends one share of each other site: of the seed of its own  -> Collector.total
                mask if its vector arrived, of its key for the other masks if not

Of n sites, `threshold` must see the round through; the others may vanish after any phase. A vector counts if it
arrived. threshold > n / 2, because each site gives one of two shares only: two sets of sites that could open one secret
each would have to overlap, so nobody ever has both secrets of a site, and a vector that came too late stays hidden.

What is protected against whom:

- A server that keeps to the protocol, but looks at all that it sees, learns who took part and the sum. The sum is what
  is left to be protected (by differential privacy): the sum of two sites tells each of them the other's vector.
- With fewer than `threshold` sites that help it, it learns the sum of the others. With `threshold` of them it learns
  every vector.
- Without signatures a server that lies can take the place of all other sites and read a vector. With the sites' own
  keys, known beforehand from their kits, it cannot, nor can a site that does not belong to the federation.
- A server that tells different sites different lists of who has answered never has both secrets of a site, but can
  get sums over fewer sites than `threshold`. That it cannot single out one site, without a site that helps it, needs
  threshold >= 2 n / 3. The round of the paper in which the sites compare their lists is left out.
- Nothing here checks what a site adds to the sum, and any site can spoil a round by a wrong share; then the round
  fails, and is not wrong. The result is right if each site keeps to the protocol.

Next to read: `participant.py`, then `collector.py`.
"""

from ml_src.core.federated.secure.collector import Collector
from ml_src.core.federated.secure.fixed_point import decode, decode_counts, encode, encode_counts
from ml_src.core.federated.secure.messages import SecureError
from ml_src.core.federated.secure.participant import Participant

__all__ = ["Collector", "Participant", "SecureError", "decode", "decode_counts", "encode", "encode_counts"]
