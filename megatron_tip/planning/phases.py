"""The phases of a step, and what each of them holds in the memory of a GPU that trainer and servers share."""

from dataclasses import dataclass

from megatron_tip.config import Config
from megatron_tip.placement.placement import Placement
from megatron_tip.rollout.engine import ALL_MEMORY, WEIGHTS

OFFLOADED = {
    "none": frozenset[str](),
    "teacher": frozenset({"teacher", "head"}),
    "optimizer": frozenset({"gradients", "optimizer"}),
    "all": frozenset({"teacher", "head", "gradients", "optimizer"}),
}
"""The parts of the trainer that leave the device while no phase needs them, by `training.offload`."""


@dataclass(frozen=True)
class Phase:
    """What a phase needs on the device, besides the student's weights, which always stay.

    `trainer`: "teacher" (its layers), "head" (its output layer's shard), "gradients" (the student's buffers),
    "optimizer" (moments and float32 weights). `servers`: "weights" and "cache" of servers on the same device.
    """

    trainer: frozenset[str] = frozenset()
    servers: frozenset[str] = frozenset()


PHASES = {
    "generate": Phase(servers=ALL_MEMORY),
    "ask": Phase(frozenset({"teacher"})),
    "score": Phase(frozenset({"head"})),
    "train": Phase(frozenset({"head", "gradients"})),
    "update": Phase(frozenset({"gradients", "optimizer"})),
    "sync": Phase(servers=frozenset({WEIGHTS})),
    "measure": Phase(frozenset({"teacher", "head"}), frozenset({WEIGHTS})),
}
"""The phases by name, in the order of a step. "measure": the held-out KL and the gauge, between a sync and the next
step. In one pass (`selection.passes`) the student's activations are held from "score" to "train". A checkpoint is saved
from wherever the optimizer's state is, so that saving moves nothing.
"""


def releases_memory(config: Config, placement: Placement) -> bool:
    """Returns whether servers give back their memory while the trainer needs it; the same on every rank."""
    wanted = config.sglang.release_memory
    if config.rollout.engine != "sglang" or wanted == "never":
        return False
    if wanted == "always":
        return True
    if config.rollout.ahead or config.sglang.router_url:  # a router's health checks end a server without its cache
        return False
    return any(server.memory_saver for server in placement.students)
