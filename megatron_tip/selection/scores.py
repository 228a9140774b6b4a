"""Selection scores, one function each: from normalised statistics, `[n]` float64, to what the budget ranks by.

Letters of the papers: `h` student entropy, `d` divergence, `c` compatibility, each after the normaliser of its rule;
`h_high` and `d_high` are 1 above the batch median, else 0. TIP is arXiv:2604.14084, TA-OPD arXiv:2605.26844.
"""

from torch import Tensor


def single(z: Tensor) -> Tensor:
    """Returns s = z: entropy-only, divergence-only, compatibility-only. TA-OPD Eq. 14 and 15."""
    return z


def total(h: Tensor, d: Tensor) -> Tensor:
    """Returns s = h + d: SE-KD's entropy with KL(q || p), in nats. arXiv:2602.01395."""
    return h + d


def ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Returns s = ln p(y) / ln q(y), the student's cross entropy on the sampled token over the teacher's.

    SE-KD's CE ratio, arXiv:2602.01395. A teacher that is certain of the token (ln q = 0) counts as 1e-6 nats from it.
    """
    return log_p / log_q.clamp(max=-1e-6)


def soft_or(h: Tensor, d: Tensor) -> Tensor:
    """Returns s = h + d - h d. TIP Eq. 7; TA-OPD Eq. 15 with its own normaliser and divergence."""
    return h + d - h * d


def confident_divergence(d: Tensor, h: Tensor) -> Tensor:
    """Returns s = d (1 - h): TIP's Q3-only ranking, with d = KL(q || p)."""
    return d * (1 - h)


def teachability(d: Tensor, c: Tensor) -> Tensor:
    """Returns s = D^L = d c: large disagreement within the student's support. TA-OPD Eq. 12."""
    return d * c


def incompatibility(d: Tensor, c: Tensor) -> Tensor:
    """Returns s = D^I = d (1 - c): large disagreement off the student's support. TA-OPD Eq. 5."""
    return d * (1 - c)


def entropy_teachability(h: Tensor, d: Tensor, c: Tensor) -> Tensor:
    """Returns s = h + s_teach - h s_teach. TA-OPD Eq. 16."""
    return soft_or(h, teachability(d, c))


def q3_divergence(h_high: Tensor, d_high: Tensor, d: Tensor) -> Tensor:
    """Returns s that ranks the rows of Q3 first, then by d. TA-OPD Table 2, Q3-only."""
    return _q3_first(h_high, d_high) + d


def q3_compatibility(h_high: Tensor, d_high: Tensor, c: Tensor) -> Tensor:
    """Returns s that ranks the rows of Q3 first, then by c. TA-OPD Table 2, Q3 + high C."""
    return _q3_first(h_high, d_high) + c


def q3_low_compatibility(h_high: Tensor, d_high: Tensor, c: Tensor) -> Tensor:
    """Returns s that ranks the rows of Q3 first, then by 1 - c. TA-OPD Table 2, Q3 + low C."""
    return _q3_first(h_high, d_high) + (1 - c)


def q3_teachability(h_high: Tensor, d_high: Tensor, d: Tensor, c: Tensor) -> Tensor:
    """Returns s that ranks the rows of Q3 first, then by D^L = d c. TA-OPD Table 7."""
    return _q3_first(h_high, d_high) + d * c


def q3_low_teachability(h_high: Tensor, d_high: Tensor, d: Tensor, c: Tensor) -> Tensor:
    """Returns s that ranks the rows of Q3 first, then by 1 - D^L. TA-OPD Table 7."""
    return _q3_first(h_high, d_high) + (1 - d * c)


def q3_incompatibility(h_high: Tensor, d_high: Tensor, d: Tensor, c: Tensor) -> Tensor:
    """Returns s that ranks the rows of Q3 first, then by D^I = d (1 - c). TA-OPD Table 7."""
    return _q3_first(h_high, d_high) + d * (1 - c)


def _q3_first(h_high: Tensor, d_high: Tensor) -> Tensor:
    """Returns 2 in Q3 (low entropy, high divergence), else 0: more than a score in [0, 1] can make up for.

    The paper gives neither the order within Q3 nor what follows when Q3 is exhausted; "then" above is our reading.
    """
    return 2 * (1 - h_high) * d_high
