"""A bank's tokens with the quantities that the papers compare: gain, H, D, C, D^L, D^I, support proxies, quadrants."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from megatron_tip.diagnostics.gain import Gain
from megatron_tip.diagnostics.scores import Scores
from megatron_tip.errors import InputError
from megatron_tip.records import TokenIndex
from megatron_tip.selection.batch import read_batch, read_values
from megatron_tip.selection.metrics import quadrant_rows
from megatron_tip.selection.order_statistics import quantiles
from megatron_tip.selection.ranking import NormalisedInputs
from megatron_tip.selection.replicas import Replicas
from megatron_tip.selection.rules import RULES

PROXIES = ("compatibility", "cbc", "jaccard", "overlap", "shared_mass")
"""Support proxies: C; CBC (see `bank_tokens`); Jaccard and overlap share of S_S and S_T; shared teacher mass."""

_SIGNALS = {"h": "entropy", "d": "divergence", "c": "compatibility", "d_l": "teachability", "d_i": "incompatible"}
"""Column of a table -> the TA-OPD rule whose score it is."""
_AXES = ("student_entropy", "reverse_kl")
"""Quadrants of TIP's plane."""


@dataclass(frozen=True)
class BankTokens:
    """A table of tokens. `frame`: one row per token. `medians`: of H and of the divergence; they cut the quadrants."""

    frame: pd.DataFrame
    medians: tuple[float, float]
    support_size: int

    def quadrant(self, name: str) -> np.ndarray:
        """Returns the mask, `[tokens]` bool, of a quadrant, "q1" to "q4"."""
        return (self.frame["quadrant"] == name).to_numpy()

    def column(self, name: str) -> np.ndarray:
        return self.frame[name].to_numpy(dtype=np.float64)


def bank_tokens(scores: Scores, gain: np.ndarray, support_size: int) -> BankTokens:
    """Returns a table of the start's scores with their `gain` `[tokens]`, and support statistics at K.

    h, d, c are H, D, C under Norm_B over these tokens, and d_l = d c, d_i = d (1 - c), computed by the rules' own
    functions. Quadrants are TIP's plane, cut at the medians of H and of the reverse KL; high is above. They do not
    depend on K. `cbc`, our contrastive binary compatibility, as the paper defines none: 1 if the teacher gives the
    sampled token at least the student's probability, else 0.
    """
    signals, quadrant, medians = _signals(scores, support_size)
    frame = pd.DataFrame(
        {
            "context": scores.context,
            "prompt": scores.prompt,
            "position": scores.position,
            "gain": np.asarray(gain, dtype=np.float64),
            "entropy": scores.columns["student_entropy"].astype(np.float64),
            "teacher_entropy": scores.columns["teacher_entropy"].astype(np.float64),
            "reverse_kl": scores.columns["reverse_kl"].astype(np.float64),
            "forward_kl": scores.columns["forward_kl"].astype(np.float64),
            "divergence": scores.statistic("support_divergence", support_size).astype(np.float64),
            "compatibility": scores.statistic("compatibility", support_size).astype(np.float64),
            **signals,
            "cbc": (scores.columns["teacher_logprobs"] >= scores.columns["student_logprobs"]).astype(np.float64),
            "jaccard": scores.statistic("support_jaccard", support_size).astype(np.float64),
            "overlap": scores.statistic("support_overlap", support_size).astype(np.float64) / support_size,
            "shared_mass": scores.statistic("shared_teacher_mass", support_size).astype(np.float64),
            "quadrant": quadrant,
        }
    )
    return BankTokens(frame, medians, support_size)


def _signals(scores: Scores, support_size: int) -> tuple[dict[str, np.ndarray], np.ndarray, tuple[float, float]]:
    """Returns h, d, c, d_l, d_i, `[tokens]` float64; quadrants, `[tokens]`; the medians of H and of the reverse KL."""
    names = ("student_entropy", "support_divergence", "compatibility", "reverse_kl")
    batch = read_batch(read_values(scores.statistics(support_size), names), scores.token_index(), Replicas())
    rules = {column: RULES[f"ta_opd_{name}"] for column, name in _SIGNALS.items()}
    wanted = frozenset[tuple[str, float]]().union(*(rule.required_quantiles for rule in rules.values()))
    entropy, divergence = medians = [(name, 0.5) for name in _AXES]
    found = quantiles(batch.values, wanted | {*medians}, batch.num_valid, batch.replicas)
    inputs = NormalisedInputs(batch, found)
    signals = {}
    for column, rule in rules.items():
        assert rule.score is not None, "only rules that rank have a column"
        signals[column] = rule.score(*(inputs[item] for item in rule.inputs)).numpy()
    rows = {name: own.numpy() for name, own in quadrant_rows(batch, found, _AXES).items()}
    return signals, np.select(list(rows.values()), list(rows), default=""), (found[entropy], found[divergence])


def mean_gain(gains: list[Gain]) -> tuple[Scores, np.ndarray]:
    """Returns the scores of the tokens that no checkpoint was trained on, and their mean gain over checkpoints.

    Raises:
        InputError: no gain is given, or no token is common to all.
    """
    if not gains:
        raise InputError("gain: expected at least one checkpoint after the start, got none")
    common = set.intersection(*({int(place) for place in np.unique(gain.before.context)} for gain in gains))
    if not common:
        raise InputError("gain: expected contexts that no checkpoint was trained on, got none; make a larger bank")
    places = np.array(sorted(common))
    kept = [np.isin(gain.before.context, places) for gain in gains]
    others = sorted(set(np.unique(gains[0].before.context).tolist()) - common)
    mean = np.mean([gain.tokens[mask] for gain, mask in zip(gains, kept, strict=True)], axis=0)
    return gains[0].before.without_contexts(others), mean


def selected_rows(scores: Scores, support_size: int, rule: str, retention_ratio: float, *, seed: int) -> np.ndarray:
    """Returns the mask, `[tokens]` bool, that the package's selector keeps: an exact share of all tokens together."""
    from megatron_tip.selection import Selector

    selector = Selector(rule, retention_ratio, "batch", tie_break="random", compare=False, seed=seed)
    index = TokenIndex(torch.from_numpy(scores.context), torch.from_numpy(scores.position))
    return selector.select(scores.statistics(support_size), index, step=0).selection_mask.numpy()
