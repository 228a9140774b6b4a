"""A snapshot of the student's start in memory, from which many trainings can begin without rebuilding anything."""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_tip.models.student import Student
from megatron_tip.training.checkpoints.student_state import complete_optimizer_state


class StudentStart:
    """A copy of the student's weights; `restore` returns the student to them, with a fresh optimizer.

    Each rank holds its own shards: the size of the weights, plus that of their float32 copies with bfloat16.
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
        """Resets weights, moments, step counts and schedule to the start, bit for bit."""
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
    """Yields the model's parameters, and those that the optimizer steps if they are different."""
    own = {id(parameter) for parameter in student.model.parameters()}
    yield from student.model.parameters()
    for group in student.optimizer.param_groups:
        yield from (parameter for parameter in group["params"] if id(parameter) not in own)
