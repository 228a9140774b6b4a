"""What a teacher in the trainer's own processes asks of micro-batches."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_tip.parallel.grid import ModelGrid
from megatron_tip.teachers.megatron import MegatronTeacher


class Configured(torch.nn.Module):
    def __init__(self, fp8: str | None) -> None:
        super().__init__()
        self.config = SimpleNamespace(fp8=fp8)


@pytest.mark.parametrize(
    "fp8, cp_size, multiples", [(None, 1, (1, 1)), (None, 2, (1, 4)), ("hybrid", 1, (16, 1)), ("e4m3", 2, (32, 4))]
)
def test_multiples_follow_from_its_layout_and_its_products(fp8: str | None, cp_size: int, multiples: tuple[int, int]):
    rest: Any = dict.fromkeys(
        ("student_groups", "hidden_size", "output_head", "vocabulary", "support_size", "with_jsd", "settings")
    )
    groups: Any = SimpleNamespace(grid=ModelGrid(2, 1, 1, cp_size=cp_size))
    teacher = MegatronTeacher(model=Configured(fp8), groups=groups, **rest)
    assert (teacher.token_multiple, teacher.sequence_multiple) == multiples
