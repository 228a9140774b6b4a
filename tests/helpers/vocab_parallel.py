"""Inputs of the vocabulary-parallel functions that are the same on every rank, their shards, and the layouts."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_tip.statistics import TokenStatistics
from megatron_tip.vocab_parallel import HiddenAndHead, ShardedVocabulary, padded_vocab_size, token_statistics
from megatron_tip.vocab_parallel.kernel_choice import KernelSetting
from tests.helpers import reference

GIVEN = [field for field in fields(TokenStatistics) if field.name != "topk_reverse_kl"]
"""What `token_statistics` can give; the other is of a teacher without a distribution."""


@dataclass(frozen=True)
class Case:
    n: int = 11
    vocab_size: int = 203
    student_dim: int = 16
    teacher_dim: int = 24
    scale: float = 1.0
    temperature: float = 1.0
    chunk_rows: int | None = 4
    support_size: int = 8
    dtype: torch.dtype = torch.float32  # bfloat16 with a scale and a temperature that are powers of two
    constant: bool = False  # all logits equal
    kernels: KernelSetting = "auto"

    def inputs(self) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(self.n + self.vocab_size)
        v = padded_vocab_size(self.vocab_size, 12)
        spread = 0.0 if self.constant else self.scale / self.student_dim**0.5
        made = {
            "student_hidden": torch.randn(self.n, self.student_dim, generator=g),
            "student_head": torch.randn(v, self.student_dim, generator=g) * spread,
            "teacher_hidden": torch.randn(self.n, self.teacher_dim, generator=g),
            "teacher_head": torch.randn(v, self.teacher_dim, generator=g) * spread,
        }
        # Few bits make the logits exact: this code is measured, not the rounding of its inputs.
        exact = self._exact_in_bfloat16 if self.dtype == torch.bfloat16 else self._exact_in_float32
        return {name: exact(name, tensor).to(self.dtype) for name, tensor in made.items()}

    def _exact_in_float32(self, name: str, tensor: Tensor) -> Tensor:
        return (tensor * 32).round() / 32

    def _exact_in_bfloat16(self, name: str, tensor: Tensor) -> Tensor:
        """Whole hidden states and heads in steps of 1/32 of the scale: 8 bits for logits up to 8 times the scale."""
        return tensor.round().clamp(-2, 2) if "hidden" in name else (tensor * 32 / self.scale).round() / 32 * self.scale

    def labels(self) -> Tensor:
        return torch.randint(0, self.vocab_size, (self.n,), generator=torch.Generator().manual_seed(1))

    def weights(self) -> Tensor:
        return torch.rand(self.n, generator=torch.Generator().manual_seed(2))

    def logits(self, name: str, head: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        inputs = self.inputs()
        hidden = inputs[f"{name}_hidden"] if hidden is None else hidden
        head = inputs[f"{name}_head"] if head is None else head
        return reference.full_logits(hidden, head, self.vocab_size, self.temperature)


def pairs(inputs: dict[str, Tensor]) -> dict[str, HiddenAndHead]:
    return {model: (inputs[f"{model}_hidden"], inputs[f"{model}_head"]) for model in ("student", "teacher")}


def called(function: Callable[..., Any], **arguments: Any) -> Any:
    """What `function` of student and teacher returns; `arguments`: Case.inputs, the vocabulary's fields and its own."""
    own = dict(arguments)
    models = {name: own.pop(name) for name in tuple(own) if name.startswith(("student_", "teacher_"))}
    settings = {field.name: own.pop(field.name) for field in fields(ShardedVocabulary) if field.name in own}
    return function(**pairs(models), vocabulary=ShardedVocabulary(**settings), **own)


def shard(tensor: Tensor, group: ProcessGroup) -> Tensor:
    return tensor.chunk(group.size())[group.rank()].clone()


def statistics(case: Case, group: ProcessGroup, **changes) -> TokenStatistics:
    inputs = case.inputs()
    arguments = {
        **{name: shard(tensor, group) if "head" in name else tensor for name, tensor in inputs.items()},
        "labels": case.labels(),
        "support_size": case.support_size,
        "vocab_size": case.vocab_size,
        "temperature": case.temperature,
        "tp_group": group,
        "chunk_rows": case.chunk_rows,
        "kernels": case.kernels,
        "with_jsd": True,
        "with_support": True,
    }
    return called(token_statistics, **(arguments | changes))


def on_every_layout(check: Callable[[ProcessGroup], None]) -> None:
    """Runs `check` at tp 1, 2, 3 and 4 in a world of four ranks."""
    for layout in ([[0], [1], [2], [3]], [[0, 1], [2, 3]], [[0, 1, 2]], [[0, 1, 2, 3]]):
        group, _ = dist.new_subgroups_by_enumeration(layout)
        if any(dist.get_rank() in ranks for ranks in layout):
            check(group)
