"""A fixed token sequence whose logprobs show whether an engine holds the student's weights."""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tip.batching.context_parts import gathered_rows
from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.models.student import Student
from megatron_tip.records import Rollout, logprobs, token_ids
from megatron_tip.vocab_parallel import ShardedVocabulary
from megatron_tip.vocab_parallel.topk_statistics import student_statistics

PROBE_LENGTH = 48
PROBE_SEED = 20_240_506


def probe_ids(vocab_size: int) -> tuple[int, ...]:
    """Returns the probe: fixed ids drawn uniformly from the vocabulary.

    Unlikely ids react most to wrong weights.
    """
    return tuple(np.random.default_rng(PROBE_SEED).integers(vocab_size, size=PROBE_LENGTH).tolist())


def probe_logprobs(student: Student, vocab_size: int, device: torch.device) -> list[float]:
    """Returns the student's logprobs of the probe ids after the first, at temperature 1, on global rank 0.

    All other ranks get an empty list. Collective over data-parallel replica 0: one forward pass of one sequence, one
    gather over its parts, and one broadcast of one float64 per id over each pipeline group. Other replicas must call it
    only if they share experts, and then pass padding through their layers.
    """
    groups = student.groups
    if groups.dp_rank != 0:
        if groups.grid.replicas_share_experts:
            student.forward([], lambda *_: None)
        return []
    ids = probe_ids(vocab_size)
    batch = _probe_batch(student, ids, device)
    micro_batches = batch.micro_batches(groups.dp_cp_rank)
    found: list[Tensor] = []

    def score(index: int, hidden_states: Tensor) -> None:
        mask = micro_batches[index].loss_mask
        labels = micro_batches[index].labels[mask]
        statistics = student_statistics(
            (student.rows(hidden_states, mask), student.output_head),
            ShardedVocabulary(vocab_size, tp_group=groups.tp_group),
            teacher_support_ids=labels.new_empty(len(labels), 0),
            labels=labels,
        )
        found.append(statistics.label_logprobs)

    student.forward(micro_batches, score)
    values = micro_batches[0].input_ids.new_zeros(len(ids) - 1).double()
    if found:
        values = gathered_rows(found[0].double(), batch.row_owners(0), groups.cp_group)
    if groups.grid.pp_size > 1:
        dist.broadcast(values, src=groups.last_stage_rank, group=groups.pp_group)
    return values.tolist() if dist.get_rank() == 0 else []


def _probe_batch(student: Student, ids: tuple[int, ...], device: torch.device) -> StepBatch:
    """Returns the probe as the only sequence of the student's first replica."""
    grid = student.groups.grid
    return StepBatch.over(
        [Rollout(0, 0, token_ids(ids[:1]), token_ids(ids[1:]), logprobs([0.0] * (len(ids) - 1)), "length", 0)],
        dp_size=1,
        max_tokens=PROBE_LENGTH,
        pad_token_id=ids[0],  # any id will do: padding comes after the tokens that are read
        token_multiple=student.token_multiple,
        device=device,
        sequence_multiple=grid.sequence_multiple,
        cp_size=grid.cp_size,
    )
