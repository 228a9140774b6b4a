"""The table of a view: the tokens of some responses with their statistics, scores and both models' top-K."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_tip.config import Config
from megatron_tip.observability.token_table import VALUES, TokenTable, TokenTableFacts, ViewedRollout
from megatron_tip.planning.settings import make_selector
from megatron_tip.records import Rollout, TokenIndex, TokenSelection
from megatron_tip.selection.metrics import QUADRANT_DIVERGENCES
from megatron_tip.statistics import STATISTICS, TokenStatistics
from megatron_tip.training.id_text import id_text

_MOST_PARTS = 6  # tokens that one character can be split into: 4 bytes, and some slack
_CUT = "\N{REPLACEMENT CHARACTER}"


def view_table(
    index: TokenIndex,
    statistics: TokenStatistics | None,
    selection: TokenSelection,
    rollouts: Sequence[Rollout],
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    step: int,
) -> TokenTable:
    """Returns the view of `step`: the first `tracking.view_samples` rollouts of a replica. No collective.

    Args:
        index, statistics, selection: of this replica's rows. The table has supports if `statistics` has them.
        rollouts: all rollouts of the step.
    """
    places = index.rollout_index.unique()[: config.tracking.view_samples].tolist()
    columns = _columns(places, index, statistics, selection, rollouts)
    columns["text"] = [text for place in places for text in token_texts(rollouts[place].response_ids, tokenizer)]
    supports = [columns[name].flatten() for name in ("student_support_ids", "teacher_support_ids") if name in columns]
    ids = np.unique(np.concatenate([array.to_numpy(zero_copy_only=False) for array in supports] or [np.empty(0)]))
    axis = next((name for name in QUADRANT_DIVERGENCES if f"selection/median_{name}" in selection.metrics), "")
    entropy, divergence = (selection.metrics.get(f"selection/median_{name}") for name in ("student_entropy", axis))
    facts = TokenTableFacts(
        step=step,
        rule=config.selection.rule,
        retention_ratio=make_selector(config).asked_share,
        temperature=config.loss.temperature,
        divergence=axis,
        medians=None if entropy is None or divergence is None else (entropy, divergence),
        rollouts=tuple(_viewed(place, rollouts[place], tokenizer) for place in places),
        points=_points(statistics, selection, axis, config.tracking.view_points),
        id_texts={int(token): id_text(int(token), tokenizer) for token in ids},
    )
    return TokenTable.of_columns(facts, columns)


def _points(
    statistics: TokenStatistics | None, selection: TokenSelection, axis: str, most: int
) -> tuple[tuple[float, float, bool], ...]:
    """Returns (entropy, divergence, is supervised) of at most `most` tokens, evenly spaced over the replica's."""
    if not statistics or not axis:
        return ()
    stride = -(-len(statistics) // most)
    values = (statistics.student_entropy, getattr(statistics, axis), selection.selection_mask)
    points = zip(*(column[::stride].tolist() for column in values), strict=True)
    return tuple((round(x, 4), round(y, 4), kept) for x, y, kept in points)


def token_texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns the text of each token.

    A character split over several tokens is the text of the last; the others are "". Of a character that is never
    completed, the bytes are shown. Apart from that, the joined texts are the response's text, as far as the tokenizer
    decodes token by token.
    """
    texts: list[str] = []
    place = 0
    while place < len(ids):
        text, taken = str(tokenizer.decode([ids[place]])), 1
        if _CUT in text:
            for length in range(2, min(_MOST_PARTS, len(ids) - place) + 1):
                whole = str(tokenizer.decode(list(ids[place : place + length])))
                if _CUT not in whole:
                    text, taken = whole, length
                    break
            else:
                text = id_text(ids[place], tokenizer)
        texts += [""] * (taken - 1) + [text]
        place += taken
    return texts


def _columns(
    places: Sequence[int],
    index: TokenIndex,
    statistics: TokenStatistics | None,
    selection: TokenSelection,
    rollouts: Sequence[Rollout],
) -> dict[str, Any]:
    """Returns the columns of all tokens of the rollouts at `places`; null for tokens that are not rows."""
    lengths = [len(rollouts[place].response_ids) for place in places]
    starts = dict(zip(places, np.cumsum([0, *lengths])[:-1].tolist(), strict=True))
    num_tokens = sum(lengths)
    owners = index.rollout_index.tolist()
    rows = [row for row, place in enumerate(owners) if place in starts]
    positions = index.position.tolist()
    where = np.array([starts[owners[row]] + positions[row] for row in rows], dtype=np.int64)

    def spread(values: Tensor) -> pa.Array:
        filled = np.full(num_tokens, np.nan, dtype=np.float32)
        filled[where] = values[rows].float().cpu().numpy()
        return pa.array(filled, from_pandas=True)  # NaN becomes null

    def marked(values: np.ndarray | bool) -> np.ndarray:
        mask = np.zeros(num_tokens, dtype=bool)
        mask[where] = values
        return mask

    columns: dict[str, Any] = {
        "rollout": [place for place, length in zip(places, lengths, strict=True) for _ in range(length)],
        "position": [position for length in lengths for position in range(length)],
        "token_id": [token for place in places for token in rollouts[place].response_ids],
        "valid": marked(True),
        "selected": marked(selection.selection_mask[rows].cpu().numpy()),
    }
    if selection.scores is not None:
        columns["score"] = spread(selection.scores)
    if statistics is not None:
        found = {name: getattr(statistics, name) for name in VALUES if name in STATISTICS}
        columns |= {name: spread(values) for name, values in found.items() if values is not None}
        columns |= dict(_supports(statistics, rows, where, num_tokens))
    return columns


def _supports(
    statistics: TokenStatistics, rows: list[int], where: np.ndarray, num_tokens: int
) -> Iterable[tuple[str, pa.Array]]:
    """Yields the top-K columns by name: lists, empty for tokens that are not rows."""
    for model in ("student", "teacher"):
        for name, dtype in ((f"{model}_support_ids", np.int32), (f"{model}_support_logprobs", np.float16)):
            values = getattr(statistics, name)
            if values is None:
                continue
            lengths = np.zeros(num_tokens, dtype=np.int32)
            lengths[where] = values.shape[1]
            order = np.argsort(where, kind="stable")
            flat = values[rows].cpu().float() if dtype is np.float16 else values[rows].cpu()
            flat = flat.numpy()[order].astype(dtype).reshape(-1)
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            yield name, pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


def _viewed(place: int, rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> ViewedRollout:
    return ViewedRollout(
        rollout=place,
        prompt_index=rollout.prompt_index,
        sample_index=rollout.sample_index,
        finish_reason=rollout.finish_reason,
        prompt=str(tokenizer.decode(list(rollout.prompt_ids))),
    )
