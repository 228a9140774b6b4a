"""Sequences in parts on several ranks give the hidden states and gradients of whole sequences on one."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_tip.batching.context_parts import context_part, gathered_rows, token_owners
from megatron_tip.batching.micro_batches import build_micro_batch
from megatron_tip.config import OptimizerConfig
from megatron_tip.conversion.bridge import load_hf
from megatron_tip.conversion.safetensors_io import HfCheckpoint
from megatron_tip.models.gpt import build_gpt
from megatron_tip.models.student import Student, build_student
from megatron_tip.parallel.grid import ModelGrid
from megatron_tip.parallel.groups import build_groups
from megatron_tip.records import MicroBatch, Rollout
from tests.helpers.distributed import run_workers
from tests.helpers.models import write_tiny_model

LENGTHS = ((7, 1, 12, 3), (31,), ())
"""Tokens of the sequences of each micro-batch; the last one is padding alone."""
LAYOUTS = [(1, 2, 1, False), (1, 4, 1, False), (2, 2, 1, False), (2, 2, 1, True), (1, 2, 2, False)]
"""tp, cp, pp, sequence parallelism; on 4 ranks."""
RECOMPUTED = (("layer",), ("core_attn", "mlp"), ())
"""What the parts recompute, layout by layout; the whole recomputes nothing."""


def micro_batches(multiple: int, token_multiple: int) -> list[MicroBatch]:
    rollouts, groups = [], []
    for lengths in LENGTHS:
        groups.append(list(range(len(rollouts), len(rollouts) + len(lengths))))
        for length in lengths:
            ids = torch.randint(0, 100, (length + 1,), generator=torch.Generator().manual_seed(len(rollouts))).tolist()
            rollouts.append(Rollout(len(rollouts), 0, ids[:1], ids[1:], (0.0,) * length, "length", 0))
    kept = [rollout.num_tokens - 1 for rollout in rollouts]
    return [
        build_micro_batch(
            rollouts, group, 0, token_multiple=token_multiple, sequence_multiple=multiple, num_kept_tokens=kept
        )
        for group in groups
    ]


def build(folder: Path, *, sequence_parallel: bool, recomputes: tuple[str, ...] = (), **sizes: int) -> Student:
    checkpoint, groups = HfCheckpoint(folder), build_groups(ModelGrid.over(4, owner="student", **sizes))
    model = build_gpt(
        checkpoint.architecture,
        groups,
        padded_vocab_size=102,
        dtype=torch.float32,
        sequence_parallel=sequence_parallel,
        recompute=recomputes,
    )
    load_hf(model, checkpoint, groups)
    return build_student(model, groups, OptimizerConfig(lr=1e-3), num_steps=1)


def run(student: Student, batches: list[MicroBatch], *, counts: bool) -> tuple[dict[tuple[int, int], Tensor], dict]:
    """Hidden states by (sequence, position) on the last stage, and the gradients of this rank's parameters.

    The loss is the sum of all rows, each value with a weight of its own; 0 on a replica that does not count.
    """
    found: dict[tuple[int, int], Tensor] = {}

    def loss_of(index: int, hidden_states: Tensor) -> Tensor:
        batch = batches[index]
        rows = student.rows(hidden_states, batch.loss_mask)
        columns = (column[batch.loss_mask].tolist() for column in (batch.rollout_indices, batch.response_positions))
        loss = hidden_states.sum() * 0
        for sequence, position, row in zip(*columns, rows, strict=True):
            found[sequence, position] = row.detach().clone()
            weights = torch.randn(row.shape, generator=torch.Generator().manual_seed(100 * sequence + position))
            loss = loss + (row * weights).sum() * counts
        return loss

    student.accumulate_gradients(batches, loss_of)
    return found, {name: parameter.main_grad.clone() for name, parameter in student.model.named_parameters()}


def check_parity(folders: list[Path]) -> int:
    """Compares all layouts; returns the number of rows that this rank compared."""
    num_compared = 0
    for place, (tp_size, cp_size, pp_size, sequence_parallel) in enumerate(LAYOUTS):
        for folder in folders:
            sizes = {"tp_size": tp_size, "pp_size": pp_size}
            recomputes = RECOMPUTED[place % len(RECOMPUTED)]
            whole = build(folder, sequence_parallel=sequence_parallel, **sizes)
            multiple = tp_size if sequence_parallel else 1
            expected, gradients = run(whole, micro_batches(1, multiple), counts=whole.groups.dp_rank == 0)
            student = build(
                folder, sequence_parallel=sequence_parallel, recomputes=recomputes, cp_size=cp_size, **sizes
            )
            cp_rank = student.groups.cp_rank
            batches = micro_batches(2 * cp_size, 2 * cp_size * multiple)
            parts = [context_part(batch, cp_size=cp_size, cp_rank=cp_rank) for batch in batches]
            hidden, part_gradients = run(student, parts, counts=student.groups.dp_rank == 0)
            assert len(hidden) == sum(part.num_valid() for part in parts) * student.groups.is_last_stage
            assert not student.groups.is_last_stage or 0 < len(hidden) < len(expected)
            for key, row in hidden.items():
                torch.testing.assert_close(row, expected[key], rtol=1e-4, atol=1e-5)
            for name, gradient in gradients.items():
                tolerance = 1e-5 * float(gradient.abs().max())
                torch.testing.assert_close(part_gradients[name], gradient, rtol=0, atol=tolerance, msg=name)
            num_compared += len(hidden)
    return num_compared


@pytest.mark.parametrize("variants", [("llama_tied_llama3_rope", "qwen3_wide_heads"), ("qwen2_untied",)])
def test_parts_of_sequences_are_the_whole(variants: tuple[str, ...], tmp_path: Path):
    folders = [write_tiny_model(tmp_path / name, name) for name in variants]
    compared = run_workers(check_parity, 4, tmp_path, folders, timeout_seconds=600)
    assert min(compared) > 0


def rows_of_parts() -> list[list[int]]:
    groups = build_groups(ModelGrid.over(4, tp_size=1, pp_size=1, cp_size=2, owner="student"))
    found = []
    for lengths, mask in (((8, 4), [1] * 12), ((4,), [1, 0, 0, 1]), ((4,), [0] * 4)):
        owners = token_owners(lengths, 2)[torch.tensor(mask, dtype=torch.bool)]
        own = torch.arange(len(owners))[owners == groups.cp_rank]
        values = torch.stack([own, own * 2], dim=1) + 100 * groups.dp_rank
        found.append(gathered_rows(values, owners, groups.cp_group).tolist())
    return found


def test_gathered_rows_are_those_of_the_replica_in_its_order(tmp_path: Path):
    for rank, found in enumerate(run_workers(rows_of_parts, 4, tmp_path)):
        shift = 100 * (rank // 2)
        expected = [[[n + shift, 2 * n + shift] for n in range(count)] for count in (12, 2, 0)]
        assert found == expected


def bytes_kept(folder: Path, cp_size: int, *recomputes: str) -> int:
    """Bytes of the tensors that this rank keeps for the backward pass of one long sequence, weights left out."""
    sizes = {"tp_size": 1, "pp_size": 1, "cp_size": cp_size}
    student = build(folder, sequence_parallel=False, recomputes=recomputes, **sizes)
    ids = torch.randint(0, 100, (513,), generator=torch.Generator().manual_seed(0)).tolist()
    rollout = Rollout(0, 0, ids[:1], ids[1:], (0.0,) * 512, "length", 0)
    whole = build_micro_batch([rollout], [0], 0, sequence_multiple=2 * cp_size, num_kept_tokens=[512])
    part = context_part(whole, cp_size=cp_size, cp_rank=student.groups.cp_rank)
    weights = {parameter.untyped_storage().data_ptr() for parameter in student.model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        student.accumulate_gradients([part], lambda _, hidden_states: hidden_states.sum())
    return sum(kept.values())


def kept_in_different_ways(folder: Path) -> list[int]:
    return [bytes_kept(folder, *how) for how in ((1,), (2,), (2, "mlp"), (2, "core_attn"), (2, "layer"))]


def test_two_ranks_keep_little_more_than_half_of_the_activations_each(tmp_path: Path):
    folder = write_tiny_model(tmp_path / "model", "qwen3_wide_heads")
    feed_forward = 4 * 256 * 3 * 48 * 4  # layers, tokens of a part, products of SwiGLU, channels, bytes of float32
    for whole, part, without_mlp, without_attention, inputs in run_workers(
        kept_in_different_ways, 4, tmp_path, folder, timeout_seconds=120
    ):
        assert 0.5 * whole < part < 0.6 * whole
        assert part - without_mlp >= feed_forward
        assert without_attention < part
        assert inputs < 0.2 * part
