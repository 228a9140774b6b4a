"""The student's start, kept in memory, so that many trainings can begin from it without building anything anew."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_tip.models.student import Student
from megatron_tip.training.checkpoints.student_state import complete_optimizer_state


class StudentStart:
    """A copy of the student's weights; `restore` sets it back to them, with an optimizer that took no step.

    Held by every rank for its own shards: the bytes of the weights, with bfloat16 those of their float32 copies too.
    """

    def __init__(self, student: Student) -> None:
        complete_optimizer_state(student)
        self._student = student
        self._weights = [tensor.detach().clone() for tensor in _weights(student)]
        self._groups = [
            {name: value for name, value in group.items() if name != "params"}
            for group in student.optimizer.param_groups
        ]
        self._num_steps = student.scheduler.num_steps

    @torch.no_grad()
    def restore(self) -> None:
        """Sets weights, moments, step counts and schedule back. Bit for bit the start."""
        for tensor, kept in zip(_weights(self._student), self._weights, strict=True):
            tensor.copy_(kept)
        for part in self._student.optimizer.chained_optimizers:
            for state in part.optimizer.state.values():
                for value in state.values():
                    if isinstance(value, Tensor):
                        value.zero_()
        self._student.scheduler.num_steps = self._num_steps
        for group, kept in zip(self._student.optimizer.param_groups, self._groups, strict=True):
            for name in group.keys() - kept.keys() - {"params"}:  # Transformer Engine's and apex's Adam: "step"
                del group[name]
            group.update(kept)


def _weights(student: Student) -> Iterator[Tensor]:
    """The model's parameters, and those that the optimizer steps where they are others."""
    own = {id(parameter) for parameter in student.model.parameters()}
    yield from student.model.parameters()
    for group in student.optimizer.param_groups:
        yield from (parameter for parameter in group["params"] if id(parameter) not in own)
