"""A first-order estimate of a run's memory per GPU: good enough to choose a layout, not exact to the gigabyte.

It counts, from shapes: weights, gradients, optimizer, activations, the teacher's rows, the loss, the embedded engine.
It does not count CUDA's context, NCCL's buffers and fragmentation; leave a tenth for them.
"""

from dataclasses import dataclass

from megatron_tip.config import Config
from megatron_tip.conversion.architecture import ModelArchitecture
from megatron_tip.conversion.model_size import layer_parameters
from megatron_tip.parallel.grid import ModelGrid
from megatron_tip.planning.dtypes import Dtypes
from megatron_tip.planning.plan import Outline
from megatron_tip.vocab_parallel import padded_vocab_size
from megatron_tip.vocab_parallel.chunks import most_rows_on_gpu

_FLOAT32 = 4
_LOSS_BUFFERS = 3
"""Chunks of float32 logits that the loss holds at most: both models' in bfloat16 and, for eager kernels, float32."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by purpose on the rank that needs the most."""

    parts: dict[str, float]

    @property
    def total_bytes(self) -> float:
        return sum(self.parts.values())

    def lines(self) -> list[str]:
        """Returns one line per part, the largest first, in GiB."""
        ordered = sorted(self.parts.items(), key=lambda part: -part[1])
        return [f"{value / 2**30:7.1f} GiB  {name}" for name, value in ordered if value >= 0.05 * 2**30]


@dataclass(frozen=True)
class _Model:
    architecture: ModelArchitecture
    grid: ModelGrid
    bytes_per_value: int

    @property
    def stage_layers(self) -> int:
        return self.architecture.num_layers // self.grid.pp_size

    @property
    def parameters_per_rank(self) -> float:
        """Parameters of the fullest stage: its layers, and embedding, head or both."""
        a, tp = self.architecture, self.grid.tp_size
        matrix = padded_vocab_size(a.vocab_size, tp) * a.hidden_size / tp
        matrices = 1 if a.tied_embeddings or self.grid.pp_size > 1 else 2
        return self.stage_layers * layer_parameters(a) / tp + matrices * matrix


def estimate_memory(config: Config, outline: Outline, *, gpu_memory_gib: float) -> MemoryEstimate:
    """Returns the estimate for GPUs, where "auto" is bfloat16. Servers take a share of `gpu_memory_gib`."""
    dtypes = Dtypes.of(config, on_gpu=True)
    student, grid = outline.student.architecture, outline.student_grid
    trained = _Model(student, grid, dtypes.student.itemsize)
    parameters = trained.parameters_per_rank
    # Megatron keeps float32 gradients, two moments, and for bfloat16 weights a float32 copy.
    optimizer_values = 3 if trained.bytes_per_value < _FLOAT32 else 2
    shards = grid.dp_size if config.optimizer.distributed else 1
    shard = outline.padded_vocab_size // grid.tp_size
    chunk_rows = config.loss.chunk_rows or most_rows_on_gpu(shard, int(gpu_memory_gib * 2**30))
    parts = {
        "student: weights": parameters * trained.bytes_per_value,
        "student: gradients, float32": parameters * _FLOAT32,
        "student: optimizer": parameters * optimizer_values * _FLOAT32 / shards,
        "student: activations of a micro-batch": _activations(config, trained),
        "loss: logits of a chunk": chunk_rows * shard * _FLOAT32 * _LOSS_BUFFERS,
        "loss: gradient of the head": shard * student.hidden_size * _FLOAT32,
    }
    if outline.teacher is not None:
        frozen = _Model(outline.teacher.architecture, outline.teacher_grid, dtypes.teacher.itemsize)
        bytes_per_row = frozen.architecture.hidden_size * frozen.bytes_per_value
        parts |= {
            "teacher: weights": frozen.parameters_per_rank * frozen.bytes_per_value,
            "teacher: head on the student's ranks": shard * bytes_per_row,
            "teacher: hidden states of a step": _rows(config, grid) * bytes_per_row,
        }
    if config.rollout.engine == "embedded":
        engine = _embedded_engine(config, student, dtypes.engine.itemsize)
        parts["embedded engine, first GPU: weights and cache"] = engine
    if share := outline.placement.memory_beside_trainers:
        parts["SGLang on the trainer's GPUs (sglang.memory_fraction)"] = share * gpu_memory_gib * 2**30
    return MemoryEstimate(parts)


def _rows(config: Config, grid: ModelGrid) -> float:
    """Returns the maximum number of response tokens in a replica's share of a step."""
    rollouts = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    return -(-rollouts // grid.dp_size) * config.rollout.max_response_tokens


def _activations(config: Config, model: _Model) -> float:
    """Returns the bytes kept for the backward pass; fused attention keeps nothing of size length x length.

    A layer keeps the inputs of its two norms and of its four matrix products, q, k, v and the products of SwiGLU. With
    recomputation it keeps only its input, except one layer at a time. Up to pp micro-batches are in flight.
    """
    a, tp = model.architecture, model.grid.tp_size
    tokens = max(config.training.max_tokens_per_micro_batch, config.longest_sequence)
    heads = (a.num_attention_heads + 2 * a.num_query_groups) * a.head_dim
    split = heads + a.num_attention_heads * a.head_dim + 3 * a.ffn_hidden_size
    whole = 4 * a.hidden_size / (tp if config.model.sequence_parallel else 1)
    layer = (split / tp + whole) * tokens * model.bytes_per_value
    in_flight = model.stage_layers * model.grid.pp_size
    if not config.model.recompute_activations:
        return in_flight * layer
    kept = a.hidden_size * tokens * model.bytes_per_value / (tp if config.model.sequence_parallel else 1)
    return in_flight * kept + layer


def _embedded_engine(config: Config, student: ModelArchitecture, bytes_per_value: int) -> float:
    """Returns the bytes of the whole student and of a batch's keys and values, on the first GPU."""
    whole = _Model(student, ModelGrid(1, 1, 1), bytes_per_value)
    cached = 2 * student.num_layers * student.num_query_groups * student.head_dim * whole.bytes_per_value
    sequences = min(config.rollout.batch_size, config.rollout.prompts_per_step * config.rollout.samples_per_prompt)
    return whole.parameters_per_rank * whole.bytes_per_value + cached * sequences * config.longest_sequence
