"""The check of a configuration for another machine; needs no weights, GPUs or prompts."""

from dataclasses import dataclass
from pathlib import Path

from megatron_tip.config import Config
from megatron_tip.errors import ConfigError
from megatron_tip.machine import Machine
from megatron_tip.placement.hosts import Hosts
from megatron_tip.placement.table import table_of
from megatron_tip.planning.description import description_of
from megatron_tip.planning.memory_estimate import UNCOUNTED, MemoryEstimate, estimate_memory
from megatron_tip.planning.plan import Outline, outline_run

_REMEDIES = (
    ("held", 'set selection.passes = "auto", or lower rollout.prompts_per_step'),
    ("embedded engine", 'generate on servers (rollout.engine = "sglang")'),
    ("activations", "lower training.max_tokens_per_micro_batch or set model.recompute_activations"),
    ("optimizer", "set optimizer.distributed or training.offload"),
    ("gradients", "raise model.tensor_parallel_size or model.pipeline_parallel_size, or set training.offload"),
    (
        "teacher: weights",
        "raise teacher.tensor_parallel_size or teacher.pipeline_parallel_size, or set training.offload",
    ),
    ("weights", "raise model.tensor_parallel_size or model.pipeline_parallel_size"),
    ("hidden states", "lower rollout.prompts_per_step or rollout.max_response_tokens, or use more GPUs"),
    ("SGLang", "give servers less memory (sglang.memory_fraction) or separate GPUs (sglang.gpus)"),
    ("head", "raise model.tensor_parallel_size"),
    ("sync: buckets", "lower sync.bucket_bytes"),
    ("logits", "lower loss.chunk_rows"),
)
"""By a part of a purpose's name, the first that matches: what makes it smaller."""


@dataclass(frozen=True)
class DryRun:
    """A configuration that can run on these machines if `gpu_memory_gib` suffice.

    `notes`: what this machine could not check. `absent`: the files and folders among it that are not here.
    """

    config: Config
    outline: Outline
    memory: MemoryEstimate
    gpu_memory_gib: float
    notes: tuple[str, ...]
    absent: tuple[Path, ...]

    def lines(self) -> list[str]:
        """Returns the result for people: models, layout, who runs where, memory, and what was not checked."""
        return [
            *description_of(self.config, self.outline),
            f"{self.outline.placement.hosts.workers} workers: {self.outline.grids_in_words()}",
            *table_of(self.outline.placement),
            f"memory of the fullest GPU, roughly: {_gib(self.memory.total_bytes)} of {self.gpu_memory_gib:g} GiB",
            *self.memory.lines(),
            *(f"not checked here: {note}" for note in self.notes),
        ]

    def require_memory(self) -> None:
        """Raises ConfigError if the estimate exceeds the GPUs' memory; names what is largest and what helps."""
        needed, given = self.memory.total_bytes, self.gpu_memory_gib * 2**30
        if needed <= given:
            return
        phase = self.memory.peak_phase
        largest = sorted(self.memory.phases[phase].items(), key=lambda part: -part[1])
        parts = [(name, size, _remedy(name)) for name, size in largest if name != UNCOUNTED][:3]
        raise ConfigError(
            f"memory: expected at most {self.gpu_memory_gib:g} GiB per GPU (--gpu-memory), got an estimate of "
            f'{_gib(needed)} GiB in phase "{phase}", {_gib(needed - given)} too many. The largest are: '
            + "; ".join(f"{name}, {_gib(size)}{remedy and f': {remedy}'}" for name, size, remedy in parts)
        )


def dry_run(config: Config, hosts: Hosts, *, gpu_memory_gib: float) -> DryRun:
    """Checks a run on other machines, except what this machine lacks, and estimates its memory.

    A model whose folder is missing here is looked up by the folder's name (`known_models`).

    Raises:
        ConfigError: it cannot run there. For other errors see `outline_run`.
    """
    machine = Machine(is_elsewhere=True)
    outline = outline_run(config, hosts.workers, machine, hosts)
    memory = estimate_memory(config, outline, gpu_memory_gib=gpu_memory_gib)
    return DryRun(config, outline, memory, gpu_memory_gib, tuple(machine.notes), tuple(machine.absent))


def _remedy(purpose: str) -> str:
    return next((remedy for part, remedy in _REMEDIES if part in purpose), "")


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f}"
