"""The inputs of the cases of tools/bench_vocab_parallel.py."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# The generalised JSD's beta, as in TRL and Liger.
BETAS = {"reverse_kl": 1.0, "forward_kl": 0.0, "jsd": 0.5}


@dataclass(frozen=True)
class Work:
    """Inputs of every case, equal in every process except for the shards of the heads.

    `student_hidden`, `teacher_hidden`: `[n, H]`; `student_head`, `teacher_head`: `[V / tp, H]`. The student's require
    their gradients. `tp_group`: None for one process.
    """

    student_hidden: Tensor
    student_head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    divergence: str
    options: dict[str, Any]
    tp_group: ProcessGroup | None = None

    @property
    def models(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.student_hidden, self.student_head, self.teacher_hidden, self.teacher_head

    @property
    def vocabulary(self) -> Any:
        """`ShardedVocabulary` of the case; the peers' interpreter lacks the package that has it."""
        from megatron_tip.vocab_parallel import ShardedVocabulary

        chunk_rows, kernels = self.options.get("chunk_rows"), self.options.get("kernels", "auto")
        return ShardedVocabulary(tp_group=self.tp_group, chunk_rows=chunk_rows, kernels=kernels)


Call = Callable[[], Tensor | None]


def make_work(task: dict[str, Any], rank: int) -> Work:
    """Returns inputs with logits of standard deviation 3; teacher and student correlate by 0.9, like related models.

    They are on the task's "device"; the CPU without one.
    """
    device = task.get("device", "cpu")
    n, dim, vocab_size = task["rows"], task["hidden"], task["vocab"]
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(n, dim, generator=generator, device=device)
    student = torch.randn(vocab_size, dim, generator=generator, device=device) * (3 / math.sqrt(dim))
    noise = torch.randn(vocab_size, dim, generator=generator, device=device) * (3 / math.sqrt(dim))
    teacher = 0.9 * student + math.sqrt(1 - 0.9**2) * noise
    dtype = getattr(torch, task["dtype"])
    shards = [head.chunk(task["tp"])[rank].to(dtype, copy=True) for head in (student, teacher)]
    group = dist.group.WORLD if task["tp"] > 1 else None
    return Work(
        hidden.to(dtype, copy=True).requires_grad_(),
        shards[0].requires_grad_(),
        hidden.to(dtype, copy=True),
        shards[1],
        task["divergence"],
        task["options"],
        group,
    )
