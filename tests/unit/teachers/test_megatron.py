"""What a teacher in the trainer's own processes asks of micro-batches."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_tip.parallel.grid import ModelGrid
from megatron_tip.teachers.megatron import MegatronTeacher


class Configured(torch.nn.Module):
    def __init__(self, fp8: str | None, grid: ModelGrid, sequence_parallel: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            fp8=fp8,
            sequence_parallel=sequence_parallel,
            tensor_model_parallel_size=grid.tp_size,
            context_parallel_size=grid.cp_size,
        )


@pytest.mark.parametrize(
    "fp8, cp_size, sequence_parallel, multiples",
    [
        (None, 1, False, (1, 1)),
        (None, 2, False, (1, 4)),
        ("hybrid", 1, False, (16, 1)),
        ("e4m3", 2, False, (32, 4)),
        (None, 1, True, (3, 1)),
        ("hybrid", 1, True, (48, 1)),
    ],
)
def test_multiples_follow_from_its_layout_and_its_products(
    fp8: str | None, cp_size: int, sequence_parallel: bool, multiples: tuple[int, int]
):
    rest: Any = dict.fromkeys(
        ("student_groups", "hidden_size", "output_head", "vocabulary", "support_size", "with_jsd", "settings")
    )
    grid = ModelGrid(3, 1, 1, cp_size=cp_size)
    groups: Any = SimpleNamespace(grid=grid)
    teacher = MegatronTeacher(model=Configured(fp8, grid, sequence_parallel), groups=groups, **rest)
    assert (teacher.token_multiple, teacher.sequence_multiple) == multiples
