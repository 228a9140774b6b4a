"""Token tables as the page's inspector takes them: a manifest, and a small block of bytes a response.

A block holds, for n tokens, in planes (`packing.planes`):
3 bytes a token: its place in the run's vocabulary; 1 byte: flags; 2 bytes for each of the view's statistics, in
thousandths; 1 byte for the number of candidates of the student, 1 byte for those of the teacher; then of all
candidates, the student's before the teacher's: 3 bytes of vocabulary, 2 bytes of probability in ten-thousandths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatron_tip.diagnostics.report_page.packing import packed, packed_json, planes, thousandths
from megatron_tip.diagnostics.report_page.visible_text import visible
from megatron_tip.observability.token_table import STATISTICS, TokenTable

SELECTED, VALID, QUADRANT_SHIFT = 1, 2, 2
_SCALE = 10_000
_SUPPORTS = tuple((f"{model}_support_ids", f"{model}_support_logprobs") for model in ("student", "teacher"))


@dataclass(frozen=True)
class Candidates:
    """Which of the recorded top-K the page carries: at most `most` a model and token, none below `least` (a share)."""

    most: int
    least: float


LADDER = (Candidates(64, 1e-3), Candidates(16, 1e-3), Candidates(8, 5e-3), Candidates(4, 1e-2), Candidates(2, 2e-2))
"""What is tried, one after the other, until a page is small enough; then none at all."""
NO_CANDIDATES = Candidates(0, 1.0)


@dataclass
class Blocks:
    """The page's blocks of bytes so far; a manifest names one by its place."""

    blocks: list[str] = field(default_factory=list)

    def add(self, block: str) -> int:
        self.blocks.append(block)
        return len(self.blocks) - 1

    @property
    def num_characters(self) -> int:
        return sum(map(len, self.blocks))


def pack_tables(tables: Sequence[TokenTable], blocks: Blocks, candidates: Candidates) -> dict[str, Any]:
    """Returns the manifest of a run's tables and puts their content into `blocks`."""
    vocabulary = _vocabulary(tables)
    ids = np.array(list(vocabulary), dtype=np.int64)
    order = np.argsort(ids)

    def places_of(wanted: np.ndarray) -> np.ndarray:
        return order[np.searchsorted(ids[order], wanted)] if len(wanted) else wanted.astype(np.int64)

    texts = [visible(text, newlines=True) for text in vocabulary.values()]
    return {
        "vocabulary": blocks.add(packed_json({"ids": ids.tolist(), "texts": texts})),
        "views": [_pack_table(table, vocabulary, places_of, blocks, candidates) for table in tables],
    }


def quadrants(entropy: np.ndarray, divergence: np.ndarray, medians: tuple[float, float] | None) -> np.ndarray:
    """Returns 1 to 4 for TIP's quadrants, 0 where they are not known. High is above the batch's median."""
    if medians is None:
        return np.zeros(len(entropy), dtype=np.uint8)
    high_entropy, high_divergence = entropy > medians[0], divergence > medians[1]
    found = np.where(high_entropy, np.where(high_divergence, 1, 2), np.where(high_divergence, 3, 4))
    return np.where(np.isnan(entropy) | np.isnan(divergence), 0, found).astype(np.uint8)


def _vocabulary(tables: Sequence[TokenTable]) -> dict[int, str]:
    """Every id that occurs, and its text."""
    vocabulary: dict[int, str] = {}
    for table in tables:
        vocabulary |= table.facts.id_texts
        ids, texts = (table.tokens.column(name).to_pylist() for name in ("token_id", "text"))
        for token, text in zip(ids, texts, strict=True):
            vocabulary.setdefault(token, text)
    return vocabulary


def _pack_table(
    table: TokenTable, vocabulary: dict[int, str], places_of: Any, blocks: Blocks, candidates: Candidates
) -> dict[str, Any]:
    facts, tokens = table.facts, table.tokens.combine_chunks()
    names = [name for name in STATISTICS if tokens.column(name).null_count < tokens.num_rows]
    points = np.array(facts.points or np.empty((0, 3)), dtype=float)
    owners = tokens.column("rollout").to_numpy()
    responses, scales = [], []
    for viewed in facts.rollouts:
        (rows,) = np.nonzero(owners == viewed.rollout)
        part = tokens.slice(int(rows[0]), len(rows)) if len(rows) else tokens.slice(0, 0)
        described, block = _pack_response(part, names, table, vocabulary, places_of, candidates)
        title = f"prompt {viewed.prompt_index}, sample {viewed.sample_index}"
        prompt = visible(viewed.prompt)
        described |= {"title": title, "prompt": prompt, "finish": viewed.finish_reason, "block": blocks.add(block)}
        responses.append(described)
    for name in names:
        values = tokens.column(name).to_numpy(zero_copy_only=False).astype(float)
        values = values[np.isfinite(values)]
        sign = -1.0 if name.endswith("logprobs") else 1.0
        scales.append(float(np.quantile(sign * values, 0.98)) if len(values) else 1.0)
    return {
        "step": facts.step,
        "rule": visible(facts.rule),
        "retention_ratio": facts.retention_ratio,
        "temperature": facts.temperature,
        "divergence": facts.divergence,
        "medians": facts.medians,
        "points": {"x": points[:, 0].tolist(), "y": points[:, 1].tolist(), "kept": (points[:, 2] > 0).tolist()},
        "statistics": names,
        "scales": scales,
        "responses": responses,
        "candidates": {"most": candidates.most, "least": candidates.least},
    }


def _pack_response(
    part: pa.Table,
    names: Sequence[str],
    table: TokenTable,
    vocabulary: dict[int, str],
    places_of: Any,
    candidates: Candidates,
) -> tuple[dict[str, Any], str]:
    """Returns what the manifest says of one response, and its block."""
    ids, texts = part.column("token_id").to_numpy(), part.column("text").to_pylist()
    selected, valid = (part.column(name).to_numpy(zero_copy_only=False).astype(bool) for name in ("selected", "valid"))
    columns = {name: part.column(name).to_numpy(zero_copy_only=False).astype(float) for name in names}
    nothing = np.full(len(ids), np.nan)
    divergence = columns.get(table.facts.divergence, nothing)
    quadrant = quadrants(columns.get("student_entropy", nothing), divergence, table.facts.medians)
    flags = SELECTED * selected + VALID * valid + (quadrant.astype(np.uint32) << QUADRANT_SHIFT)
    pieces = [planes(places_of(ids), 3), planes(flags, 1)]
    for name, values in columns.items():
        pieces.append(planes(thousandths(-values if name.endswith("logprobs") else values), 2))
    pieces += _candidate_pieces(part, places_of, candidates)
    other = {
        place: text for place, (token, text) in enumerate(zip(ids, texts, strict=True)) if vocabulary[token] != text
    }
    described = {
        "tokens": len(ids),
        "valid": int(valid.sum()),
        "selected": int(selected.sum()),
        "quadrants": [int((quadrant == k).sum()) for k in range(1, 5)],
        "texts": {place: visible(text, newlines=True) for place, text in other.items()},
    }
    return described, packed(b"".join(pieces))


def _candidate_pieces(part: pa.Table, places_of: Any, candidates: Candidates) -> list[bytes]:
    counts, places, shares = [], [], []
    for ids_name, logprobs_name in _SUPPORTS:
        ids, logprobs = (part.column(name).combine_chunks() for name in (ids_name, logprobs_name))
        # A column that is null everywhere, or a token without candidates, has length 0.
        lengths = pc.call_function("list_value_length", [ids]).to_numpy(zero_copy_only=False)
        lengths = np.nan_to_num(lengths).astype(np.int64)
        flat = ids.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
        share = np.exp(logprobs.flatten().to_numpy(zero_copy_only=False).astype(np.float64))
        rows = np.repeat(np.arange(len(lengths)), lengths)
        rank = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        carried = (rank < candidates.most) & (share >= candidates.least)
        counts.append(planes(np.bincount(rows[carried], minlength=len(lengths)), 1))
        places.append(places_of(flat[carried]))
        shares.append(np.rint(share[carried] * _SCALE))
    return [*counts, planes(np.concatenate(places), 3), planes(np.concatenate(shares), 2)]
