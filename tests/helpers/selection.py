"""Batches of token statistics, and the papers' selections in plain numpy float64, one process, no radix."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from megatron_tip.records import TokenIndex
from megatron_tip.selection import RULES
from megatron_tip.statistics import TokenStatistics


def make_batch(
    seed: int, lengths: list[int], *, levels: int | None = None, gap: int = 0
) -> tuple[TokenStatistics, TokenIndex]:
    """Returns random statistics of rollouts of these lengths; `levels` rounds them so that many are equal.

    `gap`: tokens of an environment after every 5 generated ones.
    """
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
        student_logprobs=-draw(5.0, 3.0),
        teacher_logprobs=-draw(6.0, 3.0),
        choice_rank=draw(16.0, 3.0).floor(),
    )
    rollout_index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    position = torch.cat([torch.arange(length) for length in lengths]) if lengths else torch.empty(0, dtype=torch.int64)
    position = position + position // 5 * gap
    return statistics, TokenIndex(rollout_index.to(torch.int64), position.to(torch.int64))


def settings_of(rule: str, retention_ratio: float, **others: Any) -> dict[str, Any]:
    """Returns arguments of a Selector by `rule`: with the budget if it has one, and constants that it must be given."""
    ratio = 1.0 if RULES[rule].take == "all" else retention_ratio
    parameters = {"tokens": 7.0} if rule == "first_segment" else {}
    return {"rule": rule, "retention_ratio": ratio, "parameters": parameters, "steps": 9, **others}


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
        "se_kd": s["student_entropy"],
        "se_kd_entropy_kl": s["student_entropy"] + s["forward_kl"],
        "se_kd_ce_ratio": s["student_logprobs"] / np.minimum(s["teacher_logprobs"], -1e-6),
        "fire": s["teacher_logprobs"],
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
        rounded = math.ceil if rule.startswith("se_kd") else math.floor
        keep[rows[: max(1, rounded(Fraction(ratio) * len(rows)))]] = True
    return keep


def reference_weights(
    rule: str, statistics: TokenStatistics, index: TokenIndex, progress: float
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The factors of each row's loss and of its further terms as the papers write them, float64, rollout by rollout."""
    s = {name: value.double().numpy() for name, value in vars(statistics).items() if value is not None}
    main, terms = np.ones(len(index)), {}
    d = s["student_logprobs"] - s["teacher_logprobs"]
    for one in np.unique(index.rollout_index.numpy()):
        rows = np.flatnonzero(index.rollout_index.numpy() == one)
        rows = rows[np.argsort(index.position.numpy()[rows])]
        length, place = len(rows), np.arange(len(rows))
        if rule == "iw_opd":
            total = np.abs(d[rows]).sum()
            before = np.array([np.abs(d[rows[:t]]).sum() for t in range(length)])
            main[rows] = 1 + 0.5 * (1 - (before / total if total else np.zeros(length)))
        elif rule == "prefix":
            r = 0.3 + 0.7 * (1 - np.cos(np.pi * progress)) / 2
            main[rows] = place < np.ceil(r * length)
        elif rule == "first_segment":
            main[rows] = place < 7
        elif rule == "sod":
            position = index.position.numpy()[rows]
            turns = np.split(rows, np.flatnonzero(np.diff(position) != 1) + 1)
            gaps = [np.abs(d[turn]).mean() for turn in turns]
            for turn, gap in zip(turns, gaps, strict=True):
                main[turn] = min((gaps[0] + 1e-6) / (gap + 1e-6), 1.5)
    if rule == "selectkd":
        main = np.where(s["choice_rank"] < 5, 1.0, 0.01)
    elif rule == "tsd_kd":
        main = 1 / (1 + np.exp(s["teacher_entropy"] - s["student_entropy"]))
    elif rule == "fire":
        main = (2 - s["teacher_entropy"] / s["teacher_entropy"].max()) * (
            1 + s["student_entropy"] / s["student_entropy"].max()
        )
    elif rule == "eopd":
        terms["forward_kl"] = 1.0 * (s["teacher_entropy"] > 0.8)
    return main, terms
