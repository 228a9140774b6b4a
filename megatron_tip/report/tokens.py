"""Token tables for the page's inspector: a manifest, and a compact block of bytes per response.

A block of n tokens holds, in planes (`packing.planes`):
per token, 3 bytes: its index in the run's vocabulary; 1 byte: flags; 2 bytes per statistic of the view, in thousandths;
1 byte each for the number of the student's and of the teacher's candidates. Then, per candidate, the student's before
the teacher's, 1 byte: which token it is; 2 bytes: its probability in ten-thousandths; and 3 bytes of vocabulary index
for each candidate that is neither the sampled token (SAMPLED) nor, for the teacher's, the student's k-th candidate (k,
from 1). A coarse block has 1 byte in place of each 2 (`packing.coarse`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatron_tip.observability.token_table import VALUES, TokenTable, ViewedRollout
from megatron_tip.report.packing import coarse, coarse_shares, packed, packed_json, planes, thousandths
from megatron_tip.report.visible_text import visible
from megatron_tip.statistics import STATISTICS

SELECTED, VALID, QUADRANT_SHIFT = 1, 2, 2
SAMPLED, ELSEWHERE = 0, 255
SAMPLED_RESPONSES = 32
_SCALE = 10_000
_SUPPORTS = tuple((f"{model}_support_ids", f"{model}_support_logprobs") for model in ("student", "teacher"))


@dataclass(frozen=True)
class Detail:
    """How much of a table the page contains: per model and token at most `most` candidates of the recorded top-K, none
    with a probability below `least`; numbers in thousandths, or `coarse`: one byte each, accurate to some percent.
    """

    most: int
    least: float
    coarse: bool = False


LADDER = (
    Detail(64, 1e-3),
    Detail(16, 1e-3),
    Detail(8, 5e-3),
    Detail(8, 5e-3, coarse=True),
    Detail(4, 1e-2, coarse=True),
    Detail(3, 2e-2, coarse=True),
    Detail(2, 5e-2, coarse=True),
    Detail(2, 1e-1, coarse=True),
    Detail(0, 1.0, coarse=True),
)
"""The details to try, in this order, until a page is small enough."""


@dataclass
class Blocks:
    """The page's blocks of bytes so far; a manifest refers to a block by its index."""

    blocks: list[str] = field(default_factory=list)

    def add(self, block: str) -> int:
        self.blocks.append(block)
        return len(self.blocks) - 1

    @property
    def num_characters(self) -> int:
        return sum(map(len, self.blocks))


class RunPacker:
    """A packer of one run's tables at several details; it computes once what does not depend on the detail."""

    def __init__(self, tables: Sequence[TokenTable]) -> None:
        self.tables = [replace(table, tokens=table.tokens.combine_chunks()) for table in tables]
        self.vocabulary = _vocabulary(tables)
        self._ids = np.array(sorted(self.vocabulary), dtype=np.int64)
        texts = [visible(self.vocabulary[token], newlines=True) for token in self._ids.tolist()]
        self._scales = [_scales(table.tokens) for table in self.tables]
        self._packed_vocabulary = packed_json({"ids": self._ids.tolist(), "texts": texts})

    def pack(self, blocks: Blocks, detail: Detail, *, every_view: int = 1) -> dict[str, Any]:
        """Returns the manifest and adds the content to `blocks`: the last view and every `every_view`-th one before it;
        with 0, no views.
        """
        views = list(zip(self.tables, self._scales, strict=True))[::-1][::every_view][::-1] if every_view else []
        if not views:
            return {"views": [], "left_out": len(self.tables)}
        return {
            "vocabulary": blocks.add(self._packed_vocabulary),
            "views": [_pack_table(*view, view[0].facts.rollouts, self, blocks, detail) for view in views],
            "left_out": len(self.tables) - len(views),
        }

    def estimate(self, detail: Detail) -> float:
        """Returns an estimate of `pack`'s number of characters, from one response in SAMPLED_RESPONSES."""
        total = float(len(self._packed_vocabulary))
        for table, scales in zip(self.tables, self._scales, strict=True):
            sampled, blocks = table.facts.rollouts[::SAMPLED_RESPONSES], Blocks()
            _pack_table(table, scales, sampled, self, blocks, detail)
            total += blocks.num_characters * len(table.facts.rollouts) / max(1, len(sampled))
        return total

    def places_of(self, ids: np.ndarray) -> np.ndarray:
        """Returns the indices of token ids in the run's vocabulary."""
        return np.searchsorted(self._ids, ids)


def statistic_labels() -> dict[str, dict[str, str]]:
    """Returns the page's labels of the rule's score and of the views' statistics, except the sampled token's."""
    meaning = "the value that the rule ranks by, made of statistics that most rules first scale over the whole batch"
    labels = {"score": {"symbol": "Score", "meaning": meaning, "unit": ""}}
    for name, one in STATISTICS.items():
        if one.in_views and one.over != "label":
            meaning = f"{one.meaning}, nats" if one.unit == "nats" else one.meaning
            labels[name] = {"symbol": one.symbol, "meaning": meaning, "unit": one.unit}
    return labels


def quadrants(entropy: np.ndarray, divergence: np.ndarray, medians: tuple[float, float] | None) -> np.ndarray:
    """Returns TIP's quadrants, 1 to 4, or 0 where unknown. High means above the batch's median."""
    if medians is None:
        return np.zeros(len(entropy), dtype=np.uint8)
    high_entropy, high_divergence = entropy > medians[0], divergence > medians[1]
    found = np.where(high_entropy, np.where(high_divergence, 1, 2), np.where(high_divergence, 3, 4))
    return np.where(np.isnan(entropy) | np.isnan(divergence), 0, found).astype(np.uint8)


def _vocabulary(tables: Sequence[TokenTable]) -> dict[int, str]:
    """Returns the text of every id that occurs."""
    vocabulary: dict[int, str] = {}
    for table in tables:
        vocabulary |= table.facts.id_texts
        ids, texts = (table.tokens.column(name).to_pylist() for name in ("token_id", "text"))
        for token, text in zip(ids, texts, strict=True):
            vocabulary.setdefault(token, text)
    return vocabulary


def _scales(tokens: pa.Table) -> dict[str, float]:
    """Returns the 98 % quantile of each existing statistic."""
    scales = {}
    for name in VALUES:
        if tokens.column(name).null_count < tokens.num_rows:
            sign = -1.0 if name.endswith("logprobs") else 1.0
            values = sign * tokens.column(name).to_numpy(zero_copy_only=False).astype(float)
            values = values[np.isfinite(values)]
            scales[name] = float(np.quantile(values, 0.98)) if len(values) else 1.0
    return scales


def _pack_table(
    table: TokenTable,
    scales: Mapping[str, float],
    rollouts: Sequence[ViewedRollout],
    packer: RunPacker,
    blocks: Blocks,
    detail: Detail,
) -> dict[str, Any]:
    """Returns one view's manifest and adds its blocks. `scales`: those of the table's statistics."""
    facts = table.facts
    names = list(scales)
    if detail.coarse:  # the candidates include the sampled token's probabilities
        names = [name for name in names if not name.endswith("logprobs")]
    points = np.array(facts.points or np.empty((0, 3)), dtype=float)
    responses = []
    for viewed in rollouts:
        described, block = _pack_response(table.tokens_of(viewed), names, table, packer, detail)
        title = f"prompt {viewed.prompt_index}, sample {viewed.sample_index}"
        prompt = visible(viewed.prompt)
        described |= {"title": title, "prompt": prompt, "finish": viewed.finish_reason, "block": blocks.add(block)}
        responses.append(described)
    return {
        "step": facts.step,
        "rule": visible(facts.rule),
        "retention_ratio": facts.retention_ratio,
        "temperature": facts.temperature,
        "divergence": facts.divergence,
        "medians": facts.medians,
        "points": {"x": points[:, 0].tolist(), "y": points[:, 1].tolist(), "kept": (points[:, 2] > 0).tolist()},
        "statistics": names,
        "scales": [scales[name] for name in names],
        "responses": responses,
        "detail": asdict(detail),
    }


def _pack_response(
    part: pa.Table,
    names: Sequence[str],
    table: TokenTable,
    packer: RunPacker,
    detail: Detail,
) -> tuple[dict[str, Any], str]:
    """Returns the manifest's entry of one response, and its block."""
    ids, texts = part.column("token_id").to_numpy(), part.column("text").to_pylist()
    selected, valid = (part.column(name).to_numpy(zero_copy_only=False).astype(bool) for name in ("selected", "valid"))
    columns = {name: part.column(name).to_numpy(zero_copy_only=False).astype(float) for name in names}
    nothing = np.full(len(ids), np.nan)
    divergence = columns.get(table.facts.divergence, nothing)
    quadrant = quadrants(columns.get("student_entropy", nothing), divergence, table.facts.medians)
    flags = SELECTED * selected + VALID * valid + (quadrant.astype(np.uint32) << QUADRANT_SHIFT)
    pieces = [planes(packer.places_of(ids), 3), planes(flags, 1)]
    for name, values in columns.items():
        positive = -values if name.endswith("logprobs") else values
        pieces.append(planes(coarse(positive), 1) if detail.coarse else planes(thousandths(positive), 2))
    pieces += _candidate_pieces(part, ids.astype(np.int64), packer, detail)
    spelled = enumerate(zip(ids.tolist(), texts, strict=True))
    other = {place: text for place, (token, text) in spelled if packer.vocabulary[token] != text}
    described = {
        "tokens": len(ids),
        "valid": int(valid.sum()),
        "selected": int(selected.sum()),
        "quadrants": [int((quadrant == k).sum()) for k in range(1, 5)],
        "texts": {place: visible(text, newlines=True) for place, text in other.items()},
    }
    return described, packed(b"".join(pieces))


def _candidate_pieces(part: pa.Table, sampled: np.ndarray, packer: RunPacker, detail: Detail) -> list[bytes]:
    """Returns the planes of both models' candidates. `sampled`: `[n]` int64, the token ids of the response."""
    student, teacher = (_carried(part, *names, detail) for names in _SUPPORTS)
    (rows_s, ranks_s, ids_s, shares_s), (rows_t, _, ids_t, shares_t) = student, teacher
    n = len(sampled)
    known = np.full((n, max(1, detail.most)), -1, dtype=np.int64)  # the student's candidates by token and rank
    known[rows_s, ranks_s] = ids_s
    same = known[rows_t] == ids_t[:, None]
    codes = np.concatenate(
        [
            np.where(ids_s == sampled[rows_s], SAMPLED, ELSEWHERE),
            np.where(ids_t == sampled[rows_t], SAMPLED, np.where(same.any(1), same.argmax(1) + 1, ELSEWHERE)),
        ]
    )
    ids, shares = np.concatenate([ids_s, ids_t]), np.concatenate([shares_s, shares_t])
    return [
        *(planes(np.bincount(rows, minlength=n), 1) for rows in (rows_s, rows_t)),
        planes(codes, 1),
        planes(coarse_shares(shares), 1) if detail.coarse else planes(np.rint(shares * _SCALE), 2),
        planes(packer.places_of(ids[codes == ELSEWHERE]), 3),
    ]


def _carried(
    part: pa.Table, ids_name: str, logprobs_name: str, detail: Detail
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns row, rank, id and probability of one model's candidates that the page contains."""
    ids, logprobs = (part.column(name).combine_chunks() for name in (ids_name, logprobs_name))
    # A column that is null everywhere, or a token without candidates, has length 0.
    lengths = np.nan_to_num(pc.call_function("list_value_length", [ids]).to_numpy(zero_copy_only=False))
    lengths = lengths.astype(np.int64)
    flat = ids.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    share = np.exp(logprobs.flatten().to_numpy(zero_copy_only=False).astype(np.float32))
    rows = np.repeat(np.arange(len(lengths)), lengths)
    rank = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    carried = (rank < detail.most) & (share >= detail.least)
    return rows[carried], rank[carried], flat[carried], share[carried]
