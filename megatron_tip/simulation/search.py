"""The search for the fastest layouts that fit: both models' parallel sizes, micro-batches, recomputation, offload."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from megatron_tip.config import Config
from megatron_tip.errors import ConfigError, MegatronTipError
from megatron_tip.placement.hosts import Hosts
from megatron_tip.placement.placement import place
from megatron_tip.planning.plan import Outline
from megatron_tip.simulation.assumptions import assumed_rollouts
from megatron_tip.simulation.device import Device
from megatron_tip.simulation.kinds import RankKind, beside_bytes, beside_ranks, offloaded
from megatron_tip.simulation.parts import ROWS_SENT
from megatron_tip.simulation.plan import Plan, make_plan, own_bytes
from megatron_tip.simulation.timing import STEP_PHASES, Generation, generation_of, moved_seconds

SIZES = (1, 2, 4, 8)
"""Tensor- and pipeline-parallel sizes that are tried."""
OFFLOADS = ("none", "teacher", "optimizer", "all")
FRACTIONS = (0.2, 0.3, 0.5, 0.7)
"""Shares of the memory of servers beside trainers."""
NUM_BEST = 5
_TOKENS = "training.max_tokens_per_micro_batch"
_LAYOUT = (
    *("model.tensor_parallel_size", "model.pipeline_parallel_size", "model.recompute_activations", _TOKENS),
    *("teacher.tensor_parallel_size", "teacher.pipeline_parallel_size"),
)

Values = dict[str, object]
"""Settings by "section.key"."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Choice:
    """A combination of settings. `seconds`: of a step with the longest batch. `missing_bytes`: above 0 if too large."""

    values: Values
    seconds: float
    missing_bytes: float


@dataclass(frozen=True)
class Found:
    """What a search found. `best`: the fastest plans that fit, of both batches; `near`: what lacks the fewest bytes."""

    num_tried: int
    best: list[tuple[Values, Plan]]
    near: list[Choice]


@dataclass(frozen=True)
class _Engines:
    """A choice of servers and offload. `generation`: of the longest batch."""

    values: Values
    config: Config
    outline: Outline
    generation: Generation


def search_layouts(config: Config, hosts: Hosts, device: Device, *, say: Say) -> Found:
    """Returns the fastest layouts on `hosts`, by the time of a typical step.

    Each layout of the student, and each of the teacher, is simulated with the longest batch beside one layout of the
    other model. A combination takes the teacher's pass from one and the rest from the other. The fastest combinations
    are then planned whole, until `NUM_BEST` of them fit.

    Args:
        say: is told what is being done.

    Raises:
        ConfigError: no layout can run at all.
    """
    students, teachers = _of_students(config, hosts, device, say), _of_teachers(config, hosts, device, say)
    if not students or not teachers:
        raise ConfigError(f"--search: expected a layout that fills {hosts.workers} GPUs, found none; change --nodes")
    engines = list(_engines(config, students[0][1], hosts))
    choices = [
        choice
        for (own, plan), (other, taught) in itertools.product(students, teachers)
        if own[_TOKENS] == other[_TOKENS]
        for choice in _combined(own | other, plan, taught, engines)
    ]
    say(f"{len(choices)} combinations of {len(students)} layouts of the student and {len(teachers)} of the teacher")
    near = sorted((one for one in choices if one.missing_bytes > 0), key=lambda one: one.missing_bytes)
    return Found(len(choices), _best(config, hosts, device, choices, say), near[:NUM_BEST])


def _best(config: Config, hosts: Hosts, device: Device, choices: list[Choice], say: Say) -> list[tuple[Values, Plan]]:
    """Returns the plans of the fastest choices that fit, the fastest typical step first."""
    best: list[tuple[Values, Plan]] = []
    tried: set[tuple[object, ...]] = set()  # one choice of servers and offload per layout, the fastest
    for choice in sorted((one for one in choices if one.missing_bytes <= 0), key=lambda one: one.seconds):
        layout = tuple(value for name, value in choice.values.items() if name in _LAYOUT)
        if layout in tried or len(best) == NUM_BEST:
            continue
        plan = make_plan(with_values(config, choice.values), hosts, device)
        say(f"planned whole, {'fits' if plan.fits else 'does not fit'}: {overrides_of(choice.values)}")
        if plan.fits:
            tried.add(layout)
            best.append((choice.values, plan))
    return sorted(best, key=lambda pair: pair[1].step_seconds("typical"))


def overrides_of(values: Values) -> str:
    """Returns settings as arguments of the command line."""
    return " ".join(
        f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in values.items()
    )


def with_values(config: Config, values: Values) -> Config:
    """Returns the configuration with other settings.

    Raises:
        ConfigError: they do not suit each other.
    """
    sections = config.model_dump()
    for name, value in values.items():
        section, key = name.split(".")
        sections[section][key] = value
    try:
        return Config.model_validate(sections)
    except ValueError as error:
        raise ConfigError(f"--search: {error}") from error


def _of_students(config: Config, hosts: Hosts, device: Device, say: Say) -> list[tuple[Values, Plan]]:
    """Returns a plan for each layout of the student, with the first of a few layouts that the teacher can take."""
    found = []
    for tp, pp, tokens, recompute in itertools.product(SIZES, SIZES, _micro_batches(config), (False, True)):
        own: Values = {
            "model.tensor_parallel_size": tp,
            "model.pipeline_parallel_size": pp,
            "model.sequence_parallel": tp > 1,
            "model.recompute_activations": recompute,
            _TOKENS: tokens,
        }
        for other_tp, other_pp in dict.fromkeys(((tp, pp), (tp, 1), (8, 1), (1, 1))):
            other: Values = {"teacher.tensor_parallel_size": other_tp, "teacher.pipeline_parallel_size": other_pp}
            if (plan := _try(config, own | other, hosts, device)) is not None:
                found.append((own, plan))
                say(f"{plan.fullest.peak_bytes / 2**30:6.1f} GiB: {overrides_of(own)}")
                break
    return found


def _of_teachers(config: Config, hosts: Hosts, device: Device, say: Say) -> list[tuple[Values, Plan]]:
    """Returns a plan for each layout of the teacher, with the student's configured layout."""
    found = []
    for tp, pp, tokens in itertools.product(SIZES, SIZES, _micro_batches(config)):
        own: Values = {"teacher.tensor_parallel_size": tp, "teacher.pipeline_parallel_size": pp, _TOKENS: tokens}
        if (plan := _try(config, own, hosts, device)) is not None:
            found.append((own, plan))
            say(f"{plan.fullest.peak_bytes / 2**30:6.1f} GiB: {overrides_of(own)}")
    return found


def _try(config: Config, values: Values, hosts: Hosts, device: Device) -> Plan | None:
    """Returns the plan of the longest batch without offload; None if the run would be refused."""
    try:
        chosen = with_values(config, values | {"training.offload": "none"})
        return make_plan(chosen, hosts, device, batches=("longest",))
    except MegatronTipError:
        return None


def _micro_batches(config: Config) -> list[int]:
    """Returns the sizes of micro-batches to try: the configured one, and twice as much."""
    own = max(config.training.max_tokens_per_micro_batch, config.longest_sequence)
    return [own, 2 * own]


def _engines(config: Config, plan: Plan, hosts: Hosts) -> Iterator[_Engines]:
    """Yields the choices of offload and, if servers share the trainer's GPUs, of their size and memory."""
    shares = config.rollout.engine == "sglang" and config.sglang.share_gpus and not config.rollout.server_urls
    sizes = itertools.product(SIZES, FRACTIONS) if shares else [(0, 0.0)]
    rollouts = assumed_rollouts(config, longest=True)
    for (tp, fraction), offload in itertools.product(sizes, OFFLOADS):
        values: Values = {"training.offload": offload}
        if tp:
            values |= {"sglang.tensor_parallel_size": tp, "sglang.memory_fraction": fraction}
        try:
            chosen = with_values(config, values)
            outline = replace(plan.outline, placement=place(chosen, hosts))
        except ConfigError:
            continue
        yield _Engines(values, chosen, outline, generation_of(chosen, outline, plan.device, rollouts))


def _combined(values: Values, plan: Plan, taught: Plan, engines: list[_Engines]) -> Iterator[Choice]:
    """Yields the choices for one layout of both models: the teacher's pass is that of `taught`."""
    device, seconds_of = plan.device, plan.phase_seconds("longest")
    training = sum(seconds_of.values()) - seconds_of["teacher"] + taught.phase_seconds("longest")["teacher"]
    bytes_of = [
        _merged(
            own_bytes(plan.config, plan.outline, rank.account, rank.scale),
            own_bytes(taught.config, taught.outline, other.account, other.scale),
        )
        for rank, other in itertools.product(plan.ranks, taught.ranks)
    ]
    for one in engines:
        beside = next(iter(beside_ranks(one.config, one.outline).values()), "")
        kind = RankKind(0, "", 1, beside)
        peak = 0.0
        for phase in bytes_of[0]:
            away, neighbour = offloaded(one.config, phase), beside_bytes(one.config, one.outline, device, kind, phase)
            own = max(sum(size for name, size in phases[phase].items() if name not in away) for phases in bytes_of)
            peak = max(peak, own + neighbour)
        moved = sum(moved_seconds(one.config, plan.ranks[0].account, device, phase) for phase in STEP_PHASES)
        total, generating = training + moved, one.generation.seconds
        seconds = max(total, generating) if one.config.rollout.ahead else total + generating
        yield Choice(values | one.values, seconds, peak - device.usable_bytes)


def _merged(own: dict[str, dict[str, float]], taught: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Returns the bytes of each phase with the teacher's layers and passes of another layout."""
    merged = {}
    for phase, parts in own.items():
        others = {name: size for name, size in taught[phase].items() if name in _OF_TEACHER}
        merged[phase] = {name: size for name, size in parts.items() if name not in _OF_TEACHER} | others
    return merged


_OF_TEACHER = ("teacher: weights", "teacher: activations", ROWS_SENT)
