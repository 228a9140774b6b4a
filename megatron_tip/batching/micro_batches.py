"""Micro-batches from a step's rollouts: who gets which sequences, how they are padded, and which rows they make.

Planning needs lengths only, so every rank computes the same plan without a collective. Shape letters as in `records`.
"""

import heapq
from collections.abc import Sequence

import numpy as np
import torch

from megatron_tip.errors import InputError
from megatron_tip.records import MicroBatch, Rollout, TokenIndex

# dp replica -> micro-batches -> places in the step's rollout list
MicroBatchPlan = list[list[list[int]]]


def plan_micro_batches(
    lengths: Sequence[int], dp_size: int, max_tokens: int, *, sequence_multiple: int = 1
) -> MicroBatchPlan:
    """Returns the sequences of each micro-batch on each data-parallel replica; a pure function.

    Replicas are balanced by tokens (longest sequence first, to the replica with the fewest so far). Within a replica,
    sequences of similar length share a micro-batch. Each place with a length above 0 appears exactly once; a length of
    0 drops the sequence. A replica without sequences gets one empty micro-batch, so that it joins every collective.

    Args:
        lengths: tokens per sequence that go through the model.
        max_tokens: upper limit of a micro-batch's padded tokens; a longer sequence gets its own micro-batch.
        sequence_multiple: sequences are padded to a multiple of it, as in `build_micro_batch`.
    """
    if dp_size < 1 or max_tokens < 1:
        raise InputError(f"plan_micro_batches: expected dp_size and max_tokens >= 1, got {dp_size} and {max_tokens}")
    if any(length < 0 for length in lengths):
        raise InputError(f"plan_micro_batches: expected lengths >= 0, got {min(lengths)}")
    padded = [_round_up(length, sequence_multiple) for length in lengths]
    longest_first = sorted((i for i in range(len(padded)) if padded[i]), key=lambda i: (-padded[i], i))
    replicas: list[list[int]] = [[] for _ in range(dp_size)]
    loads = [(0, replica) for replica in range(dp_size)]
    for index in longest_first:
        load, replica = heapq.heappop(loads)
        replicas[replica].append(index)
        heapq.heappush(loads, (load + padded[index], replica))
    return [_pack(indices, padded, max_tokens) for indices in replicas]


def _pack(longest_first: list[int], padded: list[int], max_tokens: int) -> list[list[int]]:
    micro_batches: list[list[int]] = []
    for index in longest_first:
        if micro_batches and (len(micro_batches[-1]) + 1) * padded[micro_batches[-1][0]] <= max_tokens:
            micro_batches[-1].append(index)
        else:
            micro_batches.append([index])
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


def build_micro_batch(
    rollouts: Sequence[Rollout],
    indices: Sequence[int],
    pad_token_id: int,
    *,
    sequence_multiple: int = 1,
    num_kept_tokens: Sequence[int] | None = None,
) -> MicroBatch:
    """Returns the micro-batch of `rollouts[i] for i in indices`, `[b, s]` int64 and bool on the CPU.

    An empty response gives a sequence without valid tokens. Tokens that an environment wrote are read, but are never
    valid labels. Without `indices`: one sequence of padding, no valid token, rollout index -1.

    Args:
        sequence_multiple: `s` is a multiple of it (the tensor-parallel size under sequence parallelism).
        num_kept_tokens: for every rollout of the step, how many of its tokens go through the model; None: all. The
            label of the last kept token is the first token cut off.
    """
    kept = [rollouts[i].num_tokens if num_kept_tokens is None else num_kept_tokens[i] for i in indices]
    width = _round_up(max(kept, default=1), sequence_multiple)
    height = max(len(indices), 1)
    input_ids = torch.full((height, width), pad_token_id)
    labels = torch.full((height, width), pad_token_id)
    response_mask = torch.zeros((height, width), dtype=torch.bool)
    for row, (index, length) in enumerate(zip(indices, kept, strict=True)):
        rollout = rollouts[index]
        assert rollout.prompt_ids, f"rollout {index} has no prompt: nothing predicts its first token"
        assert 0 < length <= rollout.num_tokens, f"rollout {index}: {length} of {rollout.num_tokens} tokens kept"
        ids = torch.from_numpy(np.concatenate([rollout.prompt_ids.array, rollout.response_ids.array]))
        num_labels = min(length, len(ids) - 1)
        input_ids[row, :length] = ids[:length]
        labels[row, :num_labels] = ids[1 : num_labels + 1]
        first = len(rollout.prompt_ids) - 1
        response_mask[row, first:num_labels] = True
        for start, end in rollout.environment_spans:
            response_mask[row, first + start : first + end] = False
    return MicroBatch(
        input_ids=input_ids,
        position_ids=torch.arange(width).expand(height, width).contiguous(),
        labels=labels,
        response_mask=response_mask,
        loss_mask=response_mask.clone(),
        rollout_indices=torch.tensor(list(indices) or [-1]),
    )


def token_index(micro_batches: Sequence[MicroBatch]) -> TokenIndex:
    """Returns where the rows of `micro_batches` stand in the rollout batch, in the order of the rows.

    Raises:
        InputError: a loss_mask that reaches beyond its response_mask.
    """
    rollout_index = []
    position = []
    for micro_batch in micro_batches:
        check_masks_nest(micro_batch)
        mask = micro_batch.loss_mask
        rollout_index.append(micro_batch.rollout_indices[:, None].expand_as(mask)[mask])
        # A response begins with a generated token; an environment may only write after it.
        first = micro_batch.response_mask.int().argmax(dim=1, keepdim=True)
        position.append((micro_batch.position_ids - first)[mask])
    return TokenIndex(torch.cat(rollout_index), torch.cat(position))


def check_masks_nest(micro_batch: MicroBatch) -> None:
    """Raises InputError, naming a place, unless the loss_mask lies within the response_mask."""
    outside = (micro_batch.loss_mask & ~micro_batch.response_mask).nonzero()
    if len(outside):
        sequence, position = outside[0].tolist()
        rollout = int(micro_batch.rollout_indices[sequence])
        raise InputError(
            f"loss_mask: expected only positions of the response_mask, got {len(outside)} others, the first at "
            f"position {position} of rollout {rollout}; only generated tokens can be supervised"
        )


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
