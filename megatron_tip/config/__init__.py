"""The run configuration: typed, frozen, read from TOML. Unknown keys and wrong types are errors.

`megatron-tip train --help` prints the text under each field. Names contain units.
"""

from pathlib import Path

from pydantic import Field, model_validator

from megatron_tip.config.data import HeldoutConfig, PromptsConfig
from megatron_tip.config.diagnostics import DiagnosticsConfig
from megatron_tip.config.learning import LossConfig, OptimizerConfig, SelectionConfig, TrainingConfig
from megatron_tip.config.models import ModelConfig, TeacherConfig
from megatron_tip.config.operation import CheckpointConfig, FaultConfig, MonitoringConfig, OutputConfig, TrackingConfig
from megatron_tip.config.rollout import RolloutConfig, SGLangConfig, SyncConfig
from megatron_tip.config.section import Section

__all__ = [
    "CheckpointConfig",
    "Config",
    "DiagnosticsConfig",
    "FaultConfig",
    "HeldoutConfig",
    "LossConfig",
    "ModelConfig",
    "MonitoringConfig",
    "OptimizerConfig",
    "OutputConfig",
    "PromptsConfig",
    "RolloutConfig",
    "RunConfig",
    "SGLangConfig",
    "Section",
    "SelectionConfig",
    "SyncConfig",
    "TeacherConfig",
    "TrackingConfig",
    "TrainingConfig",
]


class RunConfig(Section):
    """The run as a whole."""

    folder: Path
    """Folder for the run's files; created if missing."""
    seed: int = 1
    """Seed of every random choice of the run: sampling, random selection, prompt order."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of all workers together; 0: as many as this process may use."""

    @model_validator(mode="after")
    def _folder_is_named(self) -> "RunConfig":
        if self.folder == Path():  # run.folder=$RUN with an unset variable
            raise ValueError(
                "run.folder: expected a separate folder for the run, got an empty text or the current directory"
            )
        return self


class Config(Section):
    """A complete run."""

    run: RunConfig
    model: ModelConfig
    teacher: TeacherConfig
    prompts: PromptsConfig
    heldout: HeldoutConfig = HeldoutConfig()
    rollout: RolloutConfig = RolloutConfig()
    sglang: SGLangConfig = SGLangConfig()
    sync: SyncConfig = SyncConfig()
    selection: SelectionConfig = SelectionConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    fault: FaultConfig = FaultConfig()
    output: OutputConfig = OutputConfig()
    tracking: TrackingConfig = TrackingConfig()
    monitoring: MonitoringConfig = MonitoringConfig()
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()

    @model_validator(mode="after")
    def _verified_answers_have_verifiers(self) -> "Config":
        if self.heldout.verify != "no" and self.prompts.source == "file" and not self.prompts.answer_field:
            raise ValueError(
                'heldout.verify: expected "no" with prompts.source = "file" and without prompts.answer_field, which '
                f'names the field with the right answer, got "{self.heldout.verify}"; set prompts.answer_field'
            )
        if self.heldout.verify == "no" and self.prompts.answer_field:
            raise ValueError(
                'prompts.answer_field: expected none with heldout.verify = "no", which compares no answers, got '
                f'"{self.prompts.answer_field}"; set heldout.verify'
            )
        if self.heldout.verify == "contains" and self.prompts.source == "reasoning_gym":
            raise ValueError(
                'heldout.verify: expected "whole" or "last_number" with prompts.source = "reasoning_gym", whose tasks '
                'score an answer themselves, got "contains"'
            )
        return self

    @model_validator(mode="after")
    def _own_teacher_is_the_student(self) -> "Config":
        """Gives a teacher that is the student the student's path, dtype and layout."""
        if self.teacher.kind != "self":
            return self
        names = (
            *("path", "dtype", "transformer_impl"),
            *("tensor_parallel_size", "pipeline_parallel_size", "pipeline_layers", "context_parallel_size"),
            *("expert_model_parallel_size", "expert_tensor_parallel_size"),
        )
        shared = {name: getattr(self.model, name) for name in names}
        for name in self.teacher.model_fields_set & shared.keys():
            if (own := getattr(self.teacher, name)) != shared[name]:
                raise ValueError(
                    f'teacher.{name}: expected that of [model], {shared[name]}, with teacher.kind = "self", got {own}'
                )
        object.__setattr__(self, "teacher", self.teacher.model_copy(update=shared))
        return self

    @property
    def longest_sequence(self) -> int:
        """Maximum tokens of a prompt and its response together, as the student reads them."""
        return self.prompts.max_prompt_tokens + self.rollout.max_response_tokens

    @property
    def longest_teacher_sequence(self) -> int:
        """Maximum tokens of a prompt and its response together, as the teacher reads them."""
        return self.prompts.longest_teacher_prompt + self.rollout.max_response_tokens
