"""The layouts among which a search looks: sizes of both models, micro-batches, recomputation, offload and servers."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from megatron_tip.config import Config

OFFLOADS = ("none", "teacher", "optimizer", "all")
"""The values of `training.offload`, those that move less first."""
_STAGES = (1, 2, 4, 8)
_TOKENS = (0.5, 1.0, 2.0)
"""Of `training.max_tokens_per_micro_batch` as configured."""


@dataclass(frozen=True)
class Sizes:
    """The tensor-, pipeline- and context-parallel sizes of a model; its data-parallel size follows from the world's."""

    tp: int
    pp: int
    cp: int = 1

    @property
    def replica(self) -> int:
        """The number of ranks of a replica."""
        return self.tp * self.pp * self.cp


Shape = tuple[Sizes, Sizes]
"""The sizes of student and teacher."""
Pair = tuple[tuple[int, int], tuple[int, int]]
"""Their tensor- and pipeline-parallel sizes."""


@dataclass(frozen=True)
class Servers:
    """SGLang servers of a node: `split` is their tensor-parallel size, `gpus` those of a node; empty: as configured."""

    split: int
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True)
class Layout:
    """A choice of everything that a search varies. `recomputed`: as `ModelConfig.recomputed`."""

    student: Sizes
    teacher: Sizes
    servers: Servers
    max_tokens: int
    recomputed: tuple[str, ...]
    offload: str

    @property
    def shape(self) -> Shape:
        return self.student, self.teacher

    @property
    def pair(self) -> Pair:
        """The sizes without cp: of layouts that differ in the rest alone, a search shows the fastest."""
        return (self.student.tp, self.student.pp), (self.teacher.tp, self.teacher.pp)

    @classmethod
    def of(cls, config: Config) -> "Layout":
        """Returns that of a configuration."""
        student, teacher = (
            Sizes(one.tensor_parallel_size, one.pipeline_parallel_size, one.context_parallel_size)
            for one in (config.model, config.teacher)
        )
        servers = Servers(config.sglang.tensor_parallel_size, config.sglang.gpus)
        training, recomputed = config.training, config.model.recomputed
        return cls(student, teacher, servers, training.max_tokens_per_micro_batch, recomputed, training.offload)

    def sequence_parallel(self, config: Config) -> bool:
        """Returns the student's sequence parallelism: off at tp 1, and above it on unless configured off above tp 1."""
        return self.student.tp > 1 and (config.model.sequence_parallel or config.model.tensor_parallel_size == 1)

    def overrides(self, config: Config) -> list[str]:
        """Returns the overrides that give `config` this layout: of what it does not have already."""
        own, model = Layout.of(config), config.model
        parallel = self.sequence_parallel(config)
        modules = [name for name in self.recomputed if name != "layer"]
        changes = {
            "model.tensor_parallel_size": (own.student.tp, self.student.tp),
            "model.pipeline_parallel_size": (own.student.pp, self.student.pp),
            "model.context_parallel_size": (own.student.cp, self.student.cp),
            "model.sequence_parallel": (model.sequence_parallel, parallel),
            "model.recompute_activations": (model.recompute_activations, "layer" in self.recomputed),
            "model.recompute_modules": (list(model.recompute_modules), modules),
            "teacher.tensor_parallel_size": (own.teacher.tp, self.teacher.tp),
            "teacher.pipeline_parallel_size": (own.teacher.pp, self.teacher.pp),
            "teacher.context_parallel_size": (own.teacher.cp, self.teacher.cp),
            "training.max_tokens_per_micro_batch": (own.max_tokens, self.max_tokens),
            "training.offload": (own.offload, self.offload),
            "sglang.tensor_parallel_size": (own.servers.split, self.servers.split),
            "sglang.gpus": (list(own.servers.gpus), list(self.servers.gpus)),
        }
        return [f"{key}={_toml(new)}" for key, (old, new) in changes.items() if new != old]


def layouts(config: Config, gpus_per_node: int) -> Iterator[Layout]:
    """Yields every choice for nodes of so many GPUs, without offload; whether it can run is not looked at.

    Sizes are powers of two, tp x cp within a node and pp up to 8, and those configured; a teacher that is the student
    has the student's. Micro-batches have half, once and twice the configured tokens. Layers are recomputed not at all,
    in their feed-forward networks, whole, or as configured.
    """
    own = Layout.of(config)
    student, teacher = (_sizes(one, gpus_per_node) for one in (own.student, own.teacher))
    shapes = [(one, one) for one in student] if config.teacher.kind == "self" else list(product(student, teacher))
    recomputed = dict.fromkeys(((), ("mlp",), ("layer",), own.recomputed))
    others = product(server_choices(config, gpus_per_node), token_limits(config), recomputed)
    for (one, other), (servers, max_tokens, layers) in product(shapes, others):
        yield Layout(one, other, servers, max_tokens, layers, offload="none")


def _sizes(own: Sizes, gpus_per_node: int) -> list[Sizes]:
    """Returns the choices for one model."""
    powers = _powers(gpus_per_node)
    pairs = product(sorted({*powers, own.tp}), sorted({*powers, own.cp}))
    within = [(tp, cp) for tp, cp in pairs if tp * cp <= gpus_per_node]
    stages = sorted({*_STAGES, own.pp})
    return list(dict.fromkeys([*(Sizes(tp, pp, cp) for (tp, cp), pp in product(within, stages)), own]))


def offloads(config: Config) -> tuple[str, ...]:
    """Returns the choices of `training.offload`: a teacher that changes stays on the device."""
    return OFFLOADS if config.teacher.update == "frozen" else ("none", "optimizer")


def token_limits(config: Config) -> list[int]:
    """Returns the choices of `training.max_tokens_per_micro_batch`."""
    return sorted({max(1, int(share * config.training.max_tokens_per_micro_batch)) for share in _TOKENS})


def server_choices(config: Config, gpus_per_node: int) -> list[Servers]:
    """Returns the choices of servers for a node.

    On shared GPUs all of them serve, and the servers' tensor-parallel size says how many there are. Of GPUs that
    servers have for themselves, up to half of a node are theirs. What is counted or started elsewhere stays as it is.
    """
    own, rollout = Layout.of(config).servers, config.rollout
    if rollout.engine != "sglang" or rollout.servers or rollout.server_urls:
        return [own]
    if config.sglang.share_gpus:
        gpus = len(own.gpus) or gpus_per_node
        return [Servers(split, own.gpus) for split in sorted({*_powers(gpus), own.split}) if gpus % split == 0]
    counts = [count for count in _powers(gpus_per_node // 2) if count % own.split == 0]
    return list(dict.fromkeys([own, *(Servers(own.split, tuple(range(gpus_per_node))[-count:]) for count in counts)]))


def _powers(most: int) -> list[int]:
    """Returns the powers of two up to `most`."""
    return [2**place for place in range(most.bit_length()) if 2**place <= most]


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "[" + ",".join(map(_quoted, value)) + "]" if isinstance(value, list) else str(value)


def _quoted(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
