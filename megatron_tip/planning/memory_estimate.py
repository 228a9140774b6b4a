"""A first-order estimate of a run's memory per GPU, phase by phase: good enough to choose a layout, not exact to the
gigabyte.

It counts, from shapes: weights, gradients, optimizer, activations, the teacher's rows, the loss, engines and servers on
the same GPU, and what a sync and a checkpoint gather. A tenth of the GPU is set aside for what it cannot count: CUDA's
context, NCCL's buffers, SGLang's captured graphs, fragmentation.
"""

from dataclasses import dataclass
from textwrap import wrap

from megatron_tip.config import Config
from megatron_tip.parallel.grid import ModelGrid
from megatron_tip.planning.beside import EngineMemory
from megatron_tip.planning.dtypes import Dtypes
from megatron_tip.planning.model_share import ModelShare, activation_bytes, forward_bytes, kept_bytes_per_token
from megatron_tip.planning.phases import OFFLOADED, PHASES, Phase
from megatron_tip.planning.plan import Outline
from megatron_tip.rollout.engine import CACHE
from megatron_tip.selection import Selector
from megatron_tip.vocab_parallel import padded_vocab_size
from megatron_tip.vocab_parallel.chunks import most_rows_on_gpu

_FLOAT32 = 4
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
_LOSS_BUFFERS = 3
"""Chunks of float32 logits that the loss holds at most: both models' in bfloat16 and, for eager kernels, float32."""
GATHERED_BYTES = 2**24
"""Each rank's part of what a checkpoint of a distributed optimizer gathers at a time."""

_HELD_SHARE = 0.5
"""What one pass may fill of the free memory: layers that are not fused keep about twice what is counted."""

_WIDTH, _CELL = 80, 6
"""Columns of the table, and of a number in it at least."""

Parts = dict[str, float]
"""Bytes by purpose."""

UNCOUNTED = "set aside: CUDA, NCCL, fragmentation"
UNCOUNTED_SHARE = 0.1
"""Of a GPU's memory."""
SERVERS = "SGLang on the trainer's GPUs (sglang.memory_fraction)"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by phase and purpose on the rank that needs the most. `host_bytes`: host memory per GPU for what leaves it.

    Phases are those of `PHASES`, without "measure" if nothing is measured, and "save". `held_tokens`: tokens of a
    replica's batch whose activations one pass may hold; 0 if a step never takes one pass. `held_total_bytes`: what the
    fullest phase takes with so many; `phases` are those of the longest batch.
    """

    phases: dict[str, Parts]
    host_bytes: float
    held_tokens: int
    held_total_bytes: float

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def total_bytes(self) -> float:
        """The bytes of the phase that needs the most."""
        return sum(self.phases[self.peak_phase].values())

    @property
    def parts(self) -> Parts:
        """The bytes of every purpose, in the phase where it takes the most."""
        found: Parts = {}
        for parts in self.phases.values():
            for name, value in parts.items():
                found[name] = max(value, found.get(name, 0.0))
        return found

    def lines(self) -> list[str]:
        """Returns the table in GiB, 80 columns wide: a column per phase, a row per purpose, largest first, the sums."""
        widths = [max(_CELL, len(phase) + 1) for phase in self.phases]
        rows = [(name, [parts.get(name, 0.0) for parts in self.phases.values()]) for name in self.parts]
        rows = [row for row in rows if max(row[1]) >= 0.05 * 2**30]
        rows.sort(key=lambda row: -max(row[1]))
        rows.append(("all", [sum(parts.values()) for parts in self.phases.values()]))
        lines = [
            f"GiB by phase; the most in {self.peak_phase}",
            "".join(f"{phase:>{width}}" for phase, width in zip(self.phases, widths, strict=True)),
        ]
        for name, values in rows:
            cells = "".join(_cell(value, width) for value, width in zip(values, widths, strict=True))
            first, *others = wrap(name, _WIDTH - len(cells) - 2, break_on_hyphens=False)
            lines += [f"{cells}  {first}", *(" " * (len(cells) + 2) + other for other in others)]
        if self.host_bytes:
            lines.append(f"host memory for training.offload: {self.host_bytes / 2**30:.1f} GiB per GPU")
        if self.held_tokens:
            lines += wrap(
                f"selection.passes: one pass fits for up to {self.held_tokens:,} tokens per replica and step, "
                f"with {self.held_total_bytes / 2**30:.1f} GiB in all",
                _WIDTH,
            )
        return lines


def _cell(value: float, width: int) -> str:
    return f"{value / 2**30:{width}.1f}" if value else f"{'-':>{width}}"


@dataclass(frozen=True)
class _Site:
    """The run whose memory is estimated."""

    config: Config
    outline: Outline
    gpu_memory_gib: float
    student: ModelShare
    teacher: ModelShare | None
    engine: EngineMemory

    @property
    def gpu_memory_bytes(self) -> float:
        return self.gpu_memory_gib * 2**30

    @property
    def movable(self) -> dict[str, tuple[str, float]]:
        """What may leave the device: by its name in `PHASES`, the name in the estimate and the bytes."""
        head_rows = self.outline.padded_vocab_size / self.student.grid.tp_size
        return _student_parts(self.config, self.student) | _teacher_parts(self.config, self.teacher, head_rows)

    @property
    def leaving(self) -> frozenset[str]:
        return OFFLOADED[self.config.training.offload] & self.movable.keys()


def estimate_memory(config: Config, outline: Outline, *, gpu_memory_gib: float, on_gpu: bool = True) -> MemoryEstimate:
    """Returns the estimate for GPUs, where "auto" is bfloat16, or for CPUs. Servers take a share of `gpu_memory_gib`.

    With selection.passes = "auto" it is that of one pass if a batch of the longest sequences fits, else of two.
    """
    dtypes, padded = Dtypes.of(config, on_gpu=on_gpu), outline.padded_vocab_size
    student = ModelShare(outline.student.architecture, outline.student_grid, dtypes.student.itemsize, padded)
    engine = EngineMemory.of(config, outline, on_gpu=on_gpu)
    site = _Site(config, outline, gpu_memory_gib, student, _teacher(config, outline, dtypes, student), engine)
    fitting, held_tokens = 0, None
    if may_take_one_pass(config, outline.selector):
        fitting, longest = _fitting_tokens(site), _num_rollouts(config, student) * config.longest_sequence
        held_tokens = longest if config.selection.passes == "one" or longest <= fitting else None
    on_host = sum(site.movable[name][1] for name in site.leaving - {"gradients"})
    most = max(sum(parts.values()) for parts in _phases(site, fitting).values())
    return MemoryEstimate(_phases(site, held_tokens), on_host, fitting, most)


def may_take_one_pass(config: Config, selector: Selector) -> bool:
    """Returns whether the configuration allows that a step's only forward pass both scores and trains.

    An auxiliary loss of experts covers all tokens in one pass and those that the cut leaves in two. With "auto"
    there are two, so that free memory does not decide what is learnt.
    """
    is_scored = selector.required_statistics or config.rollout.importance_cap or config.tracking.view_every_steps
    if config.selection.passes == "auto" and config.model.moe_aux_loss_coeff:
        return False
    return bool(is_scored) and config.selection.passes != "two" and config.model.pipeline_parallel_size == 1


def _fitting_tokens(site: _Site) -> int:
    """Returns the tokens of a replica whose activations one pass may hold beside everything else."""
    phases = _phases(site, held_tokens=0)
    free = site.gpu_memory_bytes - max(sum(phases[name].values()) for name in ("score", "train"))
    return max(0, int(_HELD_SHARE * free / kept_bytes_per_token(site.config, site.student)))


def _phases(site: _Site, held_tokens: int | None) -> dict[str, Parts]:
    """Returns the bytes by phase and purpose of one pass that holds `held_tokens`; None: of two passes."""
    config, movable = site.config, site.movable
    last = "measure" if config.heldout.num_prompts else "sync"
    phases: dict[str, Parts] = {}
    for phase, working in _working(site, held_tokens).items():
        needed = PHASES[phase if phase in PHASES else last]
        stays = [part for name, part in movable.items() if name in needed.trainer or name not in site.leaving]
        always = {UNCOUNTED: UNCOUNTED_SHARE * site.gpu_memory_bytes, "student: weights": site.student.weight_bytes}
        phases[phase] = {**always, **dict(stays), **working, **_beside(site, needed)}
    return phases


def _beside(site: _Site, phase: Phase) -> Parts:
    """Returns the bytes of what shares the GPU: a server, or on the first GPU the embedded engine."""
    engine, held = site.engine, phase.servers
    if site.config.rollout.engine == "embedded":
        cache = engine.embedded_cache_bytes(site.config) if CACHE in held else 0.0
        parts = {"embedded engine, first GPU: weights": engine.weight_bytes, "embedded engine, first GPU: cache": cache}
        return {name: size for name, size in parts.items() if size}
    if not site.outline.placement.memory_beside_trainers:
        return {}
    return {SERVERS: engine.server_bytes(site.config, site.outline, held, site.gpu_memory_bytes)}


def _teacher(config: Config, outline: Outline, dtypes: Dtypes, student: ModelShare) -> ModelShare | None:
    if config.teacher.update != "frozen":
        return student
    if outline.teacher is None:
        return None
    grid, architecture = outline.teacher_grid, outline.teacher.architecture
    padded = padded_vocab_size(architecture.vocab_size, grid.tp_size)
    return ModelShare(architecture, grid, dtypes.teacher.itemsize, padded, has_head=False)


def _student_parts(config: Config, student: ModelShare) -> dict[str, tuple[str, float]]:
    """Returns what may leave the device: by its name in `PHASES`, the name in the estimate and the bytes."""
    optimizer = config.optimizer
    # Megatron keeps gradients, two moments, and for bfloat16 weights a copy. By default all are float32.
    value_bytes = _BYTES[optimizer.exp_avg_dtype] + _BYTES[optimizer.exp_avg_sq_dtype]
    if student.bytes_per_value < _FLOAT32:
        value_bytes += _copy_bytes(config)
    state = student.num_updated(distributed=optimizer.distributed) * value_bytes
    gradients = student.num_parameters * _BYTES[optimizer.main_grads_dtype]
    name = "float32" if optimizer.main_grads_dtype == "fp32" else "bfloat16"
    return {
        "gradients": (f"student: gradients, {name}", gradients),
        "optimizer": ("student: optimizer", state),
    }


def _copy_bytes(config: Config) -> int:
    """Returns the bytes per weight of the optimizer's copy of bfloat16 weights.

    Transformer Engine's AdamW keeps of a float32 copy only the half that the weights do not have.
    """
    if config.optimizer.use_precision_aware_optimizer:
        return 2
    return _FLOAT32


def _teacher_parts(config: Config, teacher: ModelShare | None, head_rows: float) -> dict[str, tuple[str, float]]:
    """Returns the same for a teacher in the trainer's processes; its head is sharded as the student's.

    A live teacher is the student; an averaged one has its head in its model, and a float32 copy of other weights.
    """
    if teacher is None or config.teacher.update == "live":
        return {}
    if config.teacher.update == "average":
        average = teacher.num_parameters * _FLOAT32 if teacher.bytes_per_value < _FLOAT32 else 0.0
        return {"teacher": ("teacher: weights", teacher.weight_bytes + average)}
    head = head_rows * teacher.architecture.hidden_size * teacher.bytes_per_value
    return {
        "teacher": ("teacher: weights", teacher.weight_bytes),
        "head": ("teacher: head on the student's ranks", head),
    }


def optimizer_shards(config: Config, grid: ModelGrid) -> int:
    """Returns among how many ranks of the student's `grid` each part of the optimizer's state is sharded."""
    return grid.dp_size * grid.cp_size if config.optimizer.distributed else 1


def _working(site: _Site, held_tokens: int | None) -> dict[str, Parts]:
    """Returns what each phase makes for itself: activations, rows, logits, what it gathers."""
    config, outline, student, teacher = site.config, site.outline, site.student, site.teacher
    shard = outline.padded_vocab_size // student.grid.tp_size
    chunk_rows = config.loss.chunk_rows or most_rows_on_gpu(shard, int(site.gpu_memory_bytes))
    rollouts = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    sent, received = _rows_of_teacher(config, student, teacher, rollouts)
    loss = {"loss: logits of a chunk": float(chunk_rows * shard * _FLOAT32 * _LOSS_BUFFERS)}
    asking = forward_bytes(config, "teacher", teacher)
    scoring, training = _student_activations(config, student, held_tokens)
    selected = {name: 2 * outline.selector.asked_share * value for name, value in received.items()}
    training |= {
        "loss: gradient of the head": shard * student.architecture.hidden_size * _FLOAT32,
        **{f"{name}, the selected": value for name, value in selected.items()},
    }
    roots = student.num_updated(distributed=config.optimizer.distributed) * _FLOAT32
    phases = {
        "generate": {},
        "ask": asking | sent | received,
        "score": scoring | loss | received,
        "train": training | loss | received,
        "update": received | {"optimizer: square roots, if AdamW is torch's": roots},
        "sync": _gathered_for_sync(config, outline, student),
    }
    if config.heldout.num_prompts:
        heldout_sent, heldout_received = _rows_of_teacher(config, student, teacher, config.heldout.num_prompts)
        measuring = asking | forward_bytes(config, "student", student) | loss
        phases["measure"] = measuring | heldout_sent | heldout_received
    shards = optimizer_shards(config, student.grid)
    phases["save"] = {"save: a piece of the optimizer": float(shards * GATHERED_BYTES if shards > 1 else 0)}
    return phases


def _student_activations(config: Config, student: ModelShare, held_tokens: int | None) -> tuple[Parts, Parts]:
    """Returns the student's activations in "score" and in "train"; `held_tokens` as for `_phases`."""
    layer = forward_bytes(config, "student", student)
    if held_tokens is None:
        return layer, {"student: activations of a micro-batch": activation_bytes(config, student)}
    held = {"student: activations of a step, held": held_tokens * kept_bytes_per_token(config, student)}
    return layer | held, layer | held


def _rows_of_teacher(
    config: Config, student: ModelShare, teacher: ModelShare | None, num_rollouts: int
) -> tuple[Parts, Parts]:
    """Returns the last hidden states of a batch that a rank has to send, and those that it receives.

    Each tp rank of the teacher's last stage has all rows of its part of its replica, and each of the student's last
    stage gets all of its own; both exist at the same time.
    """
    if teacher is None:
        return {}, {}
    row = teacher.architecture.hidden_size * teacher.bytes_per_value
    longest = config.rollout.max_response_tokens
    grids = (teacher.grid, student.grid)
    sent, received = (-(-num_rollouts // grid.dp_size) * longest * row / grid.cp_size for grid in grids)
    return {"teacher: hidden states to send": sent}, {"teacher: hidden states of a step": received}


def _gathered_for_sync(config: Config, outline: Outline, student: ModelShare) -> Parts:
    """Returns the largest tensor whole, gathered and merged, and buckets on their way to servers."""
    a = student.architecture
    largest = max(student.padded_vocab_size, 2 * a.ffn_hidden_size) * a.hidden_size * student.bytes_per_value
    num_buckets = 2 if outline.placement.transport == "ipc" else 1  # one that servers load, one that is filled
    buckets = num_buckets * config.sync.bucket_bytes if config.rollout.engine == "sglang" else 0
    return {"sync: a whole tensor, gathered and merged": 2.0 * largest, "sync: buckets": float(buckets)}


def _num_rollouts(config: Config, model: ModelShare) -> int:
    """Returns the rollouts of the fullest replica."""
    return -(-config.rollout.prompts_per_step * config.rollout.samples_per_prompt // model.grid.dp_size)
