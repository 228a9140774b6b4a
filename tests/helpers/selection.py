"""Batches of token statistics, and the papers' selections in plain numpy float64, one process, no radix."""

import math
from fractions import Fraction

import numpy as np
import torch

from megatron_tip.records import TokenIndex
from megatron_tip.statistics import TokenStatistics


def make_batch(seed: int, lengths: list[int], *, levels: int | None = None) -> tuple[TokenStatistics, TokenIndex]:
    """Returns random statistics of rollouts of these lengths; `levels` rounds them so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    num_rows = sum(lengths)

    def draw(scale: float, power: float = 1.0) -> torch.Tensor:
        values = torch.rand(num_rows, generator=generator) ** power * scale
        return values if levels is None else (values * levels / scale).floor() / levels * scale

    statistics = TokenStatistics(
        student_entropy=draw(10.0, 4.0),
        teacher_entropy=draw(10.0, 4.0),
        reverse_kl=draw(8.0, 3.0),
        forward_kl=draw(9.0, 3.0),
        support_divergence=draw(7.0, 3.0),
        compatibility=1 - draw(1.0, 3.0),
        compatibility_lower_bound=1 - draw(1.0, 2.0),
        support_overlap=draw(16.0),
        support_jaccard=draw(1.0),
        shared_teacher_mass=draw(1.0),
        student_mass_on_teacher_support=draw(1.0),
    )
    rollout_index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    position = torch.cat([torch.arange(length) for length in lengths]) if lengths else torch.empty(0, dtype=torch.int64)
    return statistics, TokenIndex(rollout_index.to(torch.int64), position.to(torch.int64))


def take_rows(statistics: TokenStatistics, index: TokenIndex, rows: torch.Tensor) -> tuple[TokenStatistics, TokenIndex]:
    """Returns these rows, in this order."""
    parts = {name: value[rows] for name, value in vars(statistics).items() if value is not None}
    return TokenStatistics(**parts), TokenIndex(index.rollout_index[rows], index.position[rows])


def shard_rows(index: TokenIndex, num_replicas: int, seed: int = 0) -> list[torch.Tensor]:
    """Returns each replica's rows: rollouts dealt at random (some replicas may get none), in a random order."""
    generator = np.random.default_rng(seed)
    rollouts = index.rollout_index.numpy()
    owner = generator.integers(0, num_replicas, size=int(rollouts.max()) + 1)
    return [
        torch.from_numpy(generator.permutation(np.flatnonzero(owner[rollouts] == replica)))
        for replica in range(num_replicas)
    ]


def norm_b(z: np.ndarray) -> np.ndarray:
    """TA-OPD Eq. 11."""
    low, high = np.quantile(z, 0.05), np.quantile(z, 0.95)
    return np.clip((z - low) / (high - low + 1e-8), 0, 1)


def min_max(z: np.ndarray) -> np.ndarray:
    span = z.max() - z.min()
    return (z - z.min()) / span if span else np.zeros_like(z)


def clipped(z: np.ndarray) -> np.ndarray:
    return np.minimum(z, np.quantile(z, 0.98))


def reference_scores(rule: str, statistics: TokenStatistics) -> np.ndarray:
    """The rule's scores as the papers write them, float64."""
    s = {name: value.double().numpy() for name, value in vars(statistics).items() if value is not None}
    h, d, c = norm_b(s["student_entropy"]), norm_b(s["support_divergence"]), norm_b(s["compatibility"])
    tip_h, tip_d = min_max(clipped(s["student_entropy"])), min_max(s["reverse_kl"])
    in_q3 = (s["student_entropy"] <= np.median(s["student_entropy"])) & (
        s["support_divergence"] > np.median(s["support_divergence"])
    )
    q3 = 2.0 * in_q3
    return {
        "tip_entropy": tip_h,
        "tip_divergence": tip_d,
        "tip_soft_or": tip_h + tip_d - tip_h * tip_d,
        "tip_q3_only": s["forward_kl"] * (1 - tip_h),
        "ta_opd_entropy": h,
        "ta_opd_divergence": d,
        "ta_opd_compatibility": c,
        "ta_opd_soft_or": h + d - h * d,
        "ta_opd_teachability": d * c,
        "ta_opd_teachability_lower_bound": d * norm_b(s["compatibility_lower_bound"]),
        "ta_opd_incompatible": d * (1 - c),
        "ta_opd_entropy_teachability": h + d * c - h * (d * c),
        "ta_opd_q3_only": q3 + d,
        "ta_opd_q3_high_compatibility": q3 + c,
        "ta_opd_q3_low_compatibility": q3 + (1 - c),
        "ta_opd_q3_high_teachability": q3 + d * c,
        "ta_opd_q3_low_teachability": q3 + (1 - d * c),
        "ta_opd_q3_high_incompatible": q3 + d * (1 - c),
    }[rule]


def reference_mask(rule: str, statistics: TokenStatistics, index: TokenIndex, ratio: str, scope: str) -> np.ndarray:
    """The rows that a full sort keeps: by score (as float32), then rollout, then position."""
    sign = -1 if rule.endswith("_bottom") else 1
    scores = sign * reference_scores(rule.removesuffix("_bottom"), statistics).astype(np.float32)
    rollout, position = index.rollout_index.numpy(), index.position.numpy()
    order = np.lexsort((position, rollout, -scores))
    keep = np.zeros(len(scores), dtype=bool)
    if scope == "batch":
        keep[order[: math.ceil(Fraction(ratio) * len(scores))]] = True
        return keep
    for one in np.unique(rollout):
        rows = order[rollout[order] == one]
        keep[rows[: max(1, math.floor(Fraction(ratio) * len(rows)))]] = True
    return keep
