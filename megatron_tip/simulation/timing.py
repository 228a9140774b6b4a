"""The time of a step's phases, from what a rank does in them and what its device can do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_tip.config import Config
from megatron_tip.planning.beside import EngineMemory
from megatron_tip.planning.phases import OFFLOADED, PHASES
from megatron_tip.planning.plan import Outline
from megatron_tip.records import Rollout
from megatron_tip.rollout.engines import engine_kind
from megatron_tip.simulation.device import Device
from megatron_tip.simulation.kinds import MEMORY_PHASES, PURPOSES
from megatron_tip.simulation.layers import CountedRank
from megatron_tip.simulation.ledger import Route, Traffic, Work
from megatron_tip.simulation.rank import LABELS

STEP_PHASES = ("teacher", "score", "select", "train", "update", "sync")
"""The simulated phases of a step, in order."""
PASSES = ("teacher", "score", "train")
"""The phases that go through a pipeline."""
PER_TOKEN = ("teacher", "score", "select", "train")
"""The phases whose work grows with the tokens of a step."""
_OF_PASSES = frozenset(LABELS[name] for name in ("tp", "cp", "tp_cp", "pp", "ep", "expt_tp", "tp_ep"))
"""The groups among which a micro-batch's activations are sent."""
_OWN_SERVERS_SHARE = 0.85
"""Share of its GPU's memory that a server takes if it has the GPU alone: about what SGLang chooses."""


@dataclass(frozen=True)
class Generation:
    """The generation of a step's rollouts by `num_servers` engines, `num_waves` times as many as their caches hold."""

    num_tokens: int
    num_servers: int
    num_waves: int
    seconds: float


def seconds_of(
    config: Config, outline: Outline, device: Device, counted: CountedRank, scale: float
) -> dict[str, float]:
    """Returns the time of each phase on one rank: arithmetic, messages, waiting in the pipeline, moves of memory."""
    account, seconds = counted.account, {}
    per_node = outline.placement.hosts.workers_per_node
    traffic = account.traffic()
    counts = {"teacher": counted.num_taught, "score": counted.num_scored, "train": counted.num_trained}
    for phase in STEP_PHASES:
        busy = device.seconds_of(_of_whole_step(account.work(phase), phase, scale))
        for route, messages in traffic.items():
            if route.phase == phase:
                busy += device.seconds_of_traffic(route, _of_step(messages, route, scale), workers_per_node=per_node)
        grid = outline.teacher_grid if phase == "teacher" else outline.student_grid
        count = counts.get(phase, 0) * scale
        busy *= (count + grid.pp_size - 1) / count if count else 1
        moved = moved_bytes(config, account.live("rollout"), phase)
        seconds[phase] = busy + moved / (device.host_gb_per_s * 1e9 * device.link_share)
    return seconds


def _of_whole_step(work: Work, phase: str, scale: float) -> Work:
    """Returns the phase's arithmetic for `scale` times as many tokens; selection has as many operations for any."""
    if phase not in PER_TOKEN:
        return work
    repeats = scale if phase in PASSES else 1
    return Work(work.matrix_flops * scale, work.memory_bytes * scale, work.num_operations * repeats)


def _of_step(traffic: Traffic, route: Route, scale: float) -> Traffic:
    """Returns the messages of a whole step: of selected rows as many, but larger."""
    times = message_scale(route, scale)
    return Traffic(traffic.num_messages * (1 if _carries_rows(route) else times), traffic.num_bytes * times)


def message_scale(route: Route, scale: float) -> float:
    """Returns how many times more messages of this route a whole step has: those of its micro-batches grow."""
    is_of_pass = route.group.removeprefix("teacher ") in _OF_PASSES or route.peer is not None
    return scale if (route.phase in PASSES and is_of_pass) or _carries_rows(route) else 1.0


def _carries_rows(route: Route) -> bool:
    """Returns whether the message has rows of a step, as long as the step has."""
    return route.phase == "select" and (route.operation == "all_to_all" or route.group == LABELS["cp"])


def moved_bytes(config: Config, live: Mapping[str, float], phase: str) -> float:
    """Returns what enters or leaves the device at the start of a phase; gradients are dropped.

    `live`: bytes by purpose while rollouts are generated, if nothing leaves the device.
    """
    order = ["sync", *STEP_PHASES]  # generation holds what a sync does
    before = PHASES[MEMORY_PHASES[order[order.index(phase, 1) - 1]]].trainer
    changed = (before ^ PHASES[MEMORY_PHASES[phase]].trainer) & OFFLOADED[config.training.offload] - {"gradients"}
    return sum(live.get(PURPOSES[name], 0.0) for name in changed)


def generation_of(config: Config, outline: Outline, device: Device, rollouts: Sequence[Rollout]) -> Generation:
    """Returns the time that the engines need, bound by their memory's bandwidth; none for rollouts that are replayed.

    Each token position of the longest response reads the weights once; each token also reads the keys and values of
    its context. What the caches cannot hold together is generated in waves, one after another, as are the batches of
    the embedded engine. A server over several GPUs adds up twice per layer and position, at the link's latency.
    Prompts, sampling and host time are left out. Servers given by URL count as their own GPUs.
    """
    tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    if not engine_kind(config).generates:
        return Generation(tokens, 0, 0, 0.0)
    engine = EngineMemory.of(config, outline, on_gpu=True)
    weights, cached = engine.weight_bytes, engine.cache_bytes_per_token
    if config.rollout.engine == "embedded":
        num_servers = split = 1
        num_waves = -(-len(rollouts) // config.rollout.batch_size)
    else:
        servers, split = outline.placement.students, config.sglang.tensor_parallel_size
        num_servers = len(servers) or len(config.rollout.server_urls) or max(1, config.rollout.servers)
        share = (servers[0].memory_fraction if servers else 0) or _OWN_SERVERS_SHARE
        room = max(share * device.memory_bytes * split - weights, cached) / cached  # tokens
        kept = sum(one.num_tokens for one in rollouts) / num_servers
        most = -(-len(rollouts) // num_servers)  # one after another, in a share that does not hold the model at all
        num_waves = min(most, -(-int(kept) // max(1, int(room))))
    longest = max(len(rollout.response_ids) for rollout in rollouts)
    contexts = sum(len(one.response_ids) * (len(one.prompt_ids) + len(one.response_ids) / 2) for one in rollouts)
    bandwidth = device.memory_tb_per_s * 1e12 * device.memory_share * split
    seconds = (num_waves * longest * weights + contexts * cached / num_servers) / bandwidth
    if split > 1:
        seconds += num_waves * longest * 2 * outline.student.architecture.num_layers * device.link_latency_us * 1e-6
    return Generation(tokens, num_servers, num_waves, seconds)
