"""Packed sequences do not see each other: a micro-batch of several equals each of them in a micro-batch of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

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

LENGTHS = (7, 1, 12, 3, 12)
IDS_EACH = 20
LAYOUTS = [(1, 1, False), (2, 1, True), (1, 2, False)]
"""tp, pp, sequence parallelism."""


def sequences(others_seed: int = 0, kept: int | None = None) -> list[Rollout]:
    """One rollout per length with ids of its own; the seed changes those of all but `kept`."""
    rollouts = []
    for place, length in enumerate(LENGTHS):
        seed = place if place == kept else place + 100 * others_seed
        generator = torch.Generator().manual_seed(seed)
        ids = (place * IDS_EACH + torch.randint(0, IDS_EACH, (length + 1,), generator=generator)).tolist()
        rollouts.append(Rollout(place, 0, tuple(ids[:1]), tuple(ids[1:]), (0.0,) * length, "length", 0))
    return rollouts


def micro_batches(student: Student, groups: list[list[int]], rollouts: list[Rollout]) -> list[MicroBatch]:
    return [build_micro_batch(rollouts, group, 0, token_multiple=student.token_multiple) for group in groups]


def run(student: Student, batches: list[MicroBatch], weighted: tuple[int, ...]) -> tuple[dict[int, Tensor], Any]:
    """Hidden states `[n, H]` by sequence, on the last stage, and the gradients of this rank's parameters.

    The loss is the sum of all hidden states of the `weighted` sequences, each value with a weight of its own.
    """
    found: dict[int, Tensor] = {}

    def loss_of(index: int, hidden_states: Tensor) -> Tensor:
        batch = batches[index]
        rows = student.rows(hidden_states, batch.loss_mask)
        owners, places = batch.rollout_indices[batch.loss_mask], batch.response_positions[batch.loss_mask]
        loss = hidden_states.sum() * 0
        for place in owners.unique().tolist():
            own = rows[owners == place]
            found[place] = own.detach().clone()
            assert places[owners == place].tolist() == list(range(len(own)))
            weights = torch.randn(own.shape, generator=torch.Generator().manual_seed(place))
            loss = loss + (own * weights).sum() * (place in weighted)
        return loss

    student.accumulate_gradients(batches, loss_of)
    return found, {name: parameter.main_grad.clone() for name, parameter in student.model.named_parameters()}


def check_layouts(folders: list[Path]) -> None:
    for tp_size, pp_size, sequence_parallel in LAYOUTS:
        groups = build_groups(ModelGrid.over(4, tp_size=tp_size, pp_size=pp_size, owner="student"))
        for folder in folders:
            checkpoint = HfCheckpoint(folder)
            model = build_gpt(
                checkpoint.architecture,
                groups,
                padded_vocab_size=102,
                dtype=torch.float32,
                sequence_parallel=sequence_parallel,
            )
            load_hf(model, checkpoint, groups)
            student = build_student(model, groups, OptimizerConfig(lr=1e-3), num_steps=1)
            check_packed_equals_alone(student)
            check_nothing_crosses(student)
            check_what_other_kernels_are_told(student)


def check_packed_equals_alone(student: Student) -> None:
    everyone = tuple(range(len(LENGTHS)))
    packed, packed_gradients = run(student, micro_batches(student, [list(everyone)], sequences()), everyone)
    alone, gradients = run(student, micro_batches(student, [[place] for place in everyone], sequences()), everyone)
    assert packed.keys() == alone.keys()
    assert not student.groups.is_last_stage or len(packed) == len(LENGTHS)
    for place, hidden in alone.items():
        torch.testing.assert_close(packed[place], hidden, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        tolerance = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=0, atol=tolerance, msg=name)


def check_nothing_crosses(student: Student, place: int = 2) -> None:
    """Other neighbours change no bit of a sequence's output, and its loss gives their tokens no gradient."""
    everyone = [list(range(len(LENGTHS)))]
    hidden, gradients = run(student, micro_batches(student, everyone, sequences()), (place,))
    others, _ = run(student, micro_batches(student, everyone, sequences(1, kept=place)), (place,))
    if student.groups.is_last_stage:
        assert torch.equal(hidden[place], others[place])
        assert not torch.equal(hidden[place + 1], others[place + 1])
    if student.groups.is_first_stage:
        embedding = gradients["embedding.word_embeddings.weight"]
        first = student.groups.tp_rank * len(embedding)
        used = (first + embedding.abs().sum(dim=1).nonzero()[:, 0]).tolist()
        own = set(sequences()[place].prompt_ids + sequences()[place].response_ids[:-1])
        assert set(used) == {token for token in own if first <= token < first + len(embedding)}


class VariableLengthKernel(torch.nn.Module):
    """What a variable-length kernel computes from the arguments that Megatron hands to Transformer Engine's attention:
    here dense, under a mask made of the boundaries alone.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        assert packed_seq_params is not None
        told = packed_seq_params
        assert attention_mask is None
        assert attn_mask_type == AttnMaskType.causal  # Transformer Engine is then told padding_causal
        assert told.qkv_format == "thd"
        assert told.cu_seqlens_q_padded is None
        assert told.cu_seqlens_kv_padded is None
        for starts, longest, tensor in (
            (told.cu_seqlens_q, told.max_seqlen_q, query),
            (told.cu_seqlens_kv, told.max_seqlen_kv, key),
        ):
            assert starts.dtype == torch.int32
            assert int(starts[0]) == 0
            assert int(starts[-1]) == tensor.shape[0], "no token lies outside of the sequences"
            assert longest == int(starts.diff().max())
        owner = torch.searchsorted(told.cu_seqlens_q, torch.arange(len(query), dtype=torch.int32), right=True)
        may_see = (owner[:, None] == owner[None]).tril()
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[2] ** 0.5
        weights = scores.masked_fill(~may_see, -torch.inf).softmax(dim=-1)
        return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)


def check_what_other_kernels_are_told(student: Student) -> None:
    everyone = tuple(range(len(LENGTHS)))
    batches = micro_batches(student, [list(everyone)], sequences())
    ours, our_gradients = run(student, batches, everyone)
    for layer in student.model.decoder.layers:
        layer.self_attention.core_attention = VariableLengthKernel()
    theirs, their_gradients = run(student, batches, everyone)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    for name, gradient in our_gradients.items():
        tolerance = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(their_gradients[name], gradient, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("variants", [("llama_tied_llama3_rope", "llama_untied"), ("qwen2_untied", "qwen3_wide_heads")])
def test_packed_sequences_are_those_alone(variants: tuple[str, str], tmp_path: Path):
    folders = [write_tiny_model(tmp_path / name, name) for name in variants]
    run_workers(check_layouts, 4, tmp_path, folders, timeout_seconds=600)
