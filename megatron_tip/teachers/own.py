"""The student as its own teacher: as it began, as it is, or a moving average of what it has been."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_tip.config import Config
from megatron_tip.conversion.bridge import load_hf
from megatron_tip.models.gpt import build_gpt, output_head_weight
from megatron_tip.models.student import Student
from megatron_tip.teachers import megatron
from megatron_tip.teachers.megatron import MegatronTeacher
from megatron_tip.teachers.setup import splits_sequence
from megatron_tip.teachers.teacher import TeacherSite

_PREFIX = "teacher."
"""Of the average's tensors in a checkpoint, beside the student's of the same names."""


@dataclass(frozen=True)
class LiveTeacher(MegatronTeacher):
    """The student itself, without a second copy. Its rows are of the weights before the step's update."""

    def tensors(self) -> dict[str, list[Tensor]]:
        return {}


@dataclass(frozen=True)
class AverageTeacher(MegatronTeacher):
    """An exponential moving average of the student, in the student's layout.

    `averages`: by parameter name, float32, which `decay` near 1 needs; the parameter itself where that is float32.
    """

    decay: float
    averages: dict[str, Tensor]

    @torch.no_grad()
    def follow(self, student: Student) -> None:
        """Moves the average to decay x average + (1 - decay) x student. No collective: the layouts are the same."""
        present = dict(student.model.named_parameters())
        for name, average in self.averages.items():
            average.lerp_(present[name].detach().to(torch.float32), 1 - self.decay)
        self._copy_averages()

    def sharded_state(self, metadata: dict[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = self.model.sharded_state_dict(prefix=_PREFIX, metadata=metadata)  # type: ignore[operator]
        return {
            key: replace(value, data=average, **({"dtype": torch.float32} if isinstance(value, ShardedTensor) else {}))
            for key, value in state.items()
            if isinstance(value, ShardedTensor | ShardedTensorFactory)
            and (average := self.averages.get(key.removeprefix(_PREFIX))) is not None
        }

    @torch.no_grad()
    def load_sharded_state(self, loaded: dict[str, Any]) -> None:
        for key, value in loaded.items():
            self.averages[key.removeprefix(_PREFIX)].copy_(value)
        self._copy_averages()

    def _copy_averages(self) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter is not self.averages[name]:
                parameter.copy_(self.averages[name])


def build(config: Config, site: TeacherSite) -> MegatronTeacher:
    """Builds the teacher that `teacher.update` names. Collective over the world.

    Raises:
        WeightsError: the student's weights, which the teacher begins with, are incomplete or damaged.
    """
    if config.teacher.update == "frozen":
        return megatron.build(config, site)
    shared: dict[str, Any] = {
        "groups": site.student_groups,
        "student_groups": site.student_groups,
        "vocabulary": site.vocabulary,
        "support_size": config.selection.support_size,
        "with_jsd": "jsd" in site.required_statistics,
        "settings": config.loss,
    }
    if config.teacher.update == "live":
        return LiveTeacher(
            model=site.student.model,
            hidden_size=get_model_config(site.student.model).hidden_size,
            output_head=site.student.output_head.detach() if site.student_groups.is_last_stage else None,
            **shared,
        )
    model = _copy_of_the_student(config, site)
    averages = {
        name: parameter if parameter.dtype == torch.float32 else parameter.float()
        for name, parameter in model.named_parameters()
    }
    return AverageTeacher(
        model=model,
        hidden_size=get_model_config(model).hidden_size,
        output_head=output_head_weight(model) if site.student_groups.is_last_stage else None,
        decay=config.teacher.ema_decay,
        averages=averages,
        **shared,
    )


def _copy_of_the_student(config: Config, site: TeacherSite) -> GPTModel:
    """Returns a second model with the student's initial weights, LM head included, without gradients."""
    assert site.checkpoint is not None, "the plan gives the student's own"
    model = build_gpt(
        site.checkpoint.architecture,
        site.student_groups,
        padded_vocab_size=site.padded_vocab_size,
        dtype=site.dtype,
        transformer_impl=config.teacher.transformer_impl,
        sequence_parallel=splits_sequence(config, site.checkpoint.architecture),
    )
    load_hf(model, site.checkpoint, site.student_groups)
    return model.requires_grad_(False).eval()
