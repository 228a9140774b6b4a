"""Micro-batches from a step's rollouts: who gets which sequences, how they are packed, and which rows they make.

Planning needs lengths only, so every rank computes the same plan without a collective. Shape letters as in `records`.
"""

import heapq
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_tip.errors import InputError
from megatron_tip.records import MicroBatch, Rollout, TokenIndex

# dp replica -> micro-batches -> places in the step's rollout list
MicroBatchPlan = list[list[list[int]]]


def plan_micro_batches(
    lengths: Sequence[int], dp_size: int, max_tokens: int, *, token_multiple: int = 1
) -> MicroBatchPlan:
    """Returns the sequences of each micro-batch on each data-parallel replica; a pure function.

    Replicas are balanced by tokens (longest sequence first, to the replica with the fewest so far). Within a replica,
    each sequence, longest first, goes to the first micro-batch that has room for it. Each place with a length above 0
    appears exactly once; a length of 0 drops the sequence. A replica without sequences gets one empty micro-batch, so
    that it joins every collective.

    Args:
        lengths: tokens per sequence that go through the model, with the padding that aligns it.
        max_tokens: upper limit of a micro-batch's tokens, with padding; a longer sequence gets its own micro-batch.
        token_multiple: micro-batches are padded to a multiple of it, as in `build_micro_batch`.
    """
    if dp_size < 1 or max_tokens < 1:
        raise InputError(f"plan_micro_batches: expected dp_size and max_tokens >= 1, got {dp_size} and {max_tokens}")
    if any(length < 0 for length in lengths):
        raise InputError(f"plan_micro_batches: expected lengths >= 0, got {min(lengths)}")
    longest_first = sorted((i for i in range(len(lengths)) if lengths[i]), key=lambda i: (-lengths[i], i))
    replicas: list[list[int]] = [[] for _ in range(dp_size)]
    loads = [(0, replica) for replica in range(dp_size)]
    for index in longest_first:
        load, replica = heapq.heappop(loads)
        replicas[replica].append(index)
        heapq.heappush(loads, (load + lengths[index], replica))
    capacity = max_tokens - max_tokens % token_multiple
    return [_pack(indices, lengths, capacity) for indices in replicas]


def _pack(longest_first: list[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    micro_batches: list[list[int]] = []
    room: list[int] = []
    for index in longest_first:
        place = next((place for place, free in enumerate(room) if free >= lengths[index]), len(room))
        if place == len(room):
            micro_batches.append([])
            room.append(capacity)
        micro_batches[place].append(index)
        room[place] -= lengths[index]
    return micro_batches or [[]]


def num_kept_tokens(rollouts: Sequence[Rollout], last_selected: Sequence[int]) -> list[int]:
    """Returns how many tokens of each sequence still matter to the loss after selection.

    Attention is causal, so nothing after the last selected position reaches the loss: loss and gradients equal those of
    the whole sequences.

    Args:
        last_selected: for each rollout, the 0-based place in the response of its last selected token, over all
            replicas; -1 if nothing is selected (the sequence is dropped: 0 tokens).
    """
    # Response token j is scored at position len(prompt) + j - 1, the last one that must go through the model.
    return [
        len(rollout.prompt_ids) + last if last >= 0 else 0
        for rollout, last in zip(rollouts, last_selected, strict=True)
    ]


def aligned_length(num_tokens: int, sequence_multiple: int) -> int:
    """Returns a sequence's length with the padding at its end that makes it a multiple."""
    return num_tokens + -num_tokens % sequence_multiple


def num_padding_tokens(num_tokens: int, token_multiple: int) -> int:
    """Returns how much padding a micro-batch of `num_tokens` has: up to a multiple, and at least one token in all."""
    return -num_tokens % token_multiple if num_tokens else token_multiple


def build_micro_batch(
    rollouts: Sequence[Rollout],
    indices: Sequence[int],
    pad_token_id: int,
    *,
    token_multiple: int = 1,
    sequence_multiple: int = 1,
    num_kept_tokens: Sequence[int] | None = None,
) -> MicroBatch:
    """Returns the micro-batch of `rollouts[i] for i in indices`, `[s]` int64 and bool on the CPU.

    An empty response gives a sequence without valid tokens. Tokens that an environment wrote are read, but are never
    valid labels. Without `indices`: one sequence of padding, no valid token, rollout index -1.

    Args:
        token_multiple: `s` is a multiple of it (the tensor-parallel size under sequence parallelism); itself a multiple
            of `sequence_multiple`.
        sequence_multiple: each sequence is padded at its end to a multiple of it (2 cp under context parallelism).
            Attention is causal, so its own tokens do not see that padding.
        num_kept_tokens: for every rollout of the step, how many of its tokens go through the model; None: all. The
            label of the last kept token is the first token cut off.
    """
    kept = [rollouts[i].num_tokens if num_kept_tokens is None else num_kept_tokens[i] for i in indices]
    lengths = tuple(aligned_length(length, sequence_multiple) for length in kept)
    parts = []
    for index, length, aligned in zip(indices, kept, lengths, strict=True):
        parts.append(_sequence(rollouts[index], index, length))
        if aligned > length:
            parts.append(_padding(length, aligned, pad_token_id))
    if padding := num_padding_tokens(sum(lengths), token_multiple):
        parts.append(_padding(0, padding, pad_token_id))
        lengths += (padding,)
    packed = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return MicroBatch(lengths, **packed, loss_mask=packed["response_mask"].clone())


def _sequence(rollout: Rollout, index: int, length: int) -> dict[str, Tensor]:
    """Returns the first `length` tokens of a rollout by field of MicroBatch, all but its loss_mask."""
    assert rollout.prompt_ids, f"rollout {index} has no prompt: nothing predicts its first token"
    assert 0 < length <= rollout.num_tokens, f"rollout {index}: {length} of {rollout.num_tokens} tokens kept"
    ids = torch.from_numpy(np.concatenate([rollout.prompt_ids.array, rollout.response_ids.array]))
    positions = torch.arange(length)
    places = positions + 1 - len(rollout.prompt_ids)
    is_generated = (places >= 0) & (places < len(rollout.response_ids))
    for start, end in rollout.environment_spans:
        is_generated &= (places < start) | (places >= end)
    return {
        "input_ids": ids[:length],
        "position_ids": positions,
        "labels": ids.roll(-1)[:length],
        "response_mask": is_generated,
        "rollout_indices": torch.full((length,), index),
        "response_positions": places,
    }


def _padding(start: int, end: int, pad_token_id: int) -> dict[str, Tensor]:
    """Returns padding at the positions from `start` to before `end` of a sequence, by field of MicroBatch."""
    ids, nothing = torch.full((end - start,), pad_token_id), torch.full((end - start,), -1)
    return {
        "input_ids": ids,
        "position_ids": torch.arange(start, end),
        "labels": ids,
        "response_mask": torch.zeros(end - start, dtype=torch.bool),
        "rollout_indices": nothing,
        "response_positions": nothing,
    }


def token_index(micro_batches: Sequence[MicroBatch]) -> TokenIndex:
    """Returns where the rows of `micro_batches` stand in the rollout batch, in the order of the rows.

    Raises:
        InputError: a loss_mask that reaches beyond its response_mask.
    """
    for micro_batch in micro_batches:
        check_masks_nest(micro_batch)
    return TokenIndex(
        torch.cat([micro_batch.rollout_indices[micro_batch.loss_mask] for micro_batch in micro_batches]),
        torch.cat([micro_batch.response_positions[micro_batch.loss_mask] for micro_batch in micro_batches]),
    )


def check_masks_nest(micro_batch: MicroBatch) -> None:
    """Raises InputError, naming a place, unless the loss_mask lies within the response_mask."""
    outside = (micro_batch.loss_mask & ~micro_batch.response_mask).nonzero()[:, 0]
    if len(outside):
        position, rollout = (int(ids[outside[0]]) for ids in (micro_batch.position_ids, micro_batch.rollout_indices))
        raise InputError(
            f"loss_mask: expected only positions of the response_mask, got {len(outside)} others, the first at "
            f"position {position} of rollout {rollout}; only generated tokens can be supervised"
        )
