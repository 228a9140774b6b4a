"""The check of a configuration for another machine; needs no weights, GPUs or prompts."""

from dataclasses import dataclass

from megatron_tip.config import Config
from megatron_tip.errors import ConfigError
from megatron_tip.machine import Machine
from megatron_tip.placement.hosts import Hosts
from megatron_tip.placement.table import table_of
from megatron_tip.planning.description import parameters_in_words
from megatron_tip.planning.memory_estimate import MemoryEstimate, estimate_memory
from megatron_tip.planning.plan import Outline, outline_run


@dataclass(frozen=True)
class DryRun:
    """A configuration that can run on `world_size` GPUs. `notes`: what this machine could not check."""

    world_size: int
    outline: Outline
    memory: MemoryEstimate
    notes: tuple[str, ...]

    def report(self, gpu_memory_gib: float) -> str:
        """Returns the result as text."""
        total = self.memory.total_bytes / 2**30
        models = (("student", self.outline.student), ("teacher", self.outline.teacher))
        lines = [
            f"{self.world_size} workers: {self.outline.grids_in_words()}",
            *(
                f"{owner}: {parameters_in_words(model.architecture)}"
                for owner, model in models
                if model and model.architecture.experts
            ),
            *table_of(self.outline.placement),
            f"memory of the fullest GPU, roughly: {total:.1f} of {gpu_memory_gib:g} GiB",
            *self.memory.lines(),
            *(f"not checked here: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def dry_run(config: Config, hosts: Hosts, *, gpu_memory_gib: float) -> DryRun:
    """Checks a run on other machines, except what this machine lacks, and estimates its memory.

    A model whose folder is missing here is looked up by the folder's name (`known_models`).

    Raises:
        ConfigError: the estimate exceeds `gpu_memory_gib`. For other errors see `outline_run`.
    """
    machine = Machine(is_elsewhere=True)
    outline = outline_run(config, hosts.workers, machine, hosts)
    memory = estimate_memory(config, outline, gpu_memory_gib=gpu_memory_gib)
    result = DryRun(hosts.workers, outline, memory, tuple(machine.notes))
    if memory.total_bytes > gpu_memory_gib * 2**30:
        raise ConfigError(
            f"memory: expected at most {gpu_memory_gib:g} GiB per GPU (--gpu-memory), got an estimate of "
            f'{memory.total_bytes / 2**30:.1f} GiB in phase "{memory.peak_phase}"; raise tensor, context or '
            "pipeline parallel sizes, set optimizer.distributed, model.recompute_activations, "
            'model.recompute_modules or training.offload, leave selection.passes at "auto", lower '
            "training.max_tokens_per_micro_batch or rollout.prompts_per_step, or give servers less "
            "memory (sglang.memory_fraction) or separate GPUs (sglang.gpus)\n" + result.report(gpu_memory_gib)
        )
    return result
