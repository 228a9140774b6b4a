"""The dtypes of weights and activations of a configuration, with "auto" resolved."""

from dataclasses import dataclass

import torch

from megatron_tip.config import Config


@dataclass(frozen=True)
class Dtypes:
    """Dtypes of student, teacher, and the student's weights in the embedded engine or in our own servers."""

    student: torch.dtype
    teacher: torch.dtype
    engine: torch.dtype

    @classmethod
    def of(cls, config: Config, *, on_gpu: bool | None = None) -> "Dtypes":
        """Returns the dtypes of a run on GPUs or on CPUs; the default is what this machine has."""
        on_gpu = torch.cuda.is_available() if on_gpu is None else on_gpu
        auto = "bfloat16" if on_gpu else "float32"
        student, teacher, engine = config.model.dtype, config.teacher.dtype, config.rollout.dtype
        names = (student, teacher, student if engine == "auto" else engine)
        return cls(*(getattr(torch, auto if name == "auto" else name) for name in names))

    @property
    def coarser(self) -> torch.dtype:
        """The lower precision of student and teacher."""
        return torch.bfloat16 if torch.bfloat16 in (self.student, self.teacher) else torch.float32
