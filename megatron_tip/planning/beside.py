"""What shares a trainer's GPU: the whole student, as the embedded engine or a server holds it."""

from dataclasses import dataclass

from megatron_tip.config import Config
from megatron_tip.conversion.architecture import ModelArchitecture
from megatron_tip.conversion.model_size import num_parameters
from megatron_tip.planning.dtypes import Dtypes
from megatron_tip.planning.phases import releases_memory
from megatron_tip.planning.plan import Outline
from megatron_tip.rollout.engine import ALL_MEMORY, CACHE, WEIGHTS


@dataclass(frozen=True)
class EngineMemory:
    """The memory of the whole student in an engine. `bytes_per_value`: of its weights and its cache."""

    architecture: ModelArchitecture
    bytes_per_value: int

    @classmethod
    def of(cls, config: Config, outline: Outline, *, on_gpu: bool) -> "EngineMemory":
        """Returns that of the run's student; on a GPU, "auto" is bfloat16."""
        return cls(outline.student.architecture, Dtypes.of(config, on_gpu=on_gpu).engine.itemsize)

    @property
    def weight_bytes(self) -> float:
        """The bytes of all weights."""
        return float(num_parameters(self.architecture) * self.bytes_per_value)

    @property
    def cache_bytes_per_token(self) -> float:
        """The bytes of a token's keys and values in all layers."""
        a = self.architecture
        return float(2 * a.num_layers * a.num_query_groups * a.head_dim * self.bytes_per_value)

    def embedded_cache_bytes(self, config: Config) -> float:
        """Returns the bytes of the embedded engine's cache while it generates a batch of the longest sequences."""
        sequences = min(config.rollout.batch_size, config.rollout.prompts_per_step * config.rollout.samples_per_prompt)
        return self.cache_bytes_per_token * sequences * config.longest_sequence

    def server_bytes(self, config: Config, outline: Outline, held: frozenset[str], gpu_memory_bytes: float) -> float:
        """Returns the bytes of a server on a trainer's GPU in a phase that leaves it `held`; 0 if there is none."""
        share = outline.placement.memory_beside_trainers
        if not share:
            return 0.0
        if not releases_memory(config, outline.placement):
            held = ALL_MEMORY
        if CACHE in held:
            return share * gpu_memory_bytes
        return self.weight_bytes / config.sglang.tensor_parallel_size if WEIGHTS in held else 0.0
