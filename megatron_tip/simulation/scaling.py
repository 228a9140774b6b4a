"""What grows with the number of ranks: messages of the selection, the first rank's work, communicators, checkpoints.

Weak scaling: each replica keeps its number of rollouts, so that prompts_per_step grows with the ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_tip.config import Config
from megatron_tip.conversion.model_size import num_parameters
from megatron_tip.errors import ConfigError
from megatron_tip.planning.memory_estimate import GATHERED_BYTES
from megatron_tip.records import Rollout
from megatron_tip.rollout.codec import encode_rollouts
from megatron_tip.simulation.account import Account
from megatron_tip.simulation.assumptions import assumed_rollouts
from megatron_tip.simulation.device import Device
from megatron_tip.simulation.ledger import BUILD
from megatron_tip.simulation.plan import Plan, make_plan, planned_hosts

WORLD_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
CHECKPOINT_BYTES_PER_PARAMETER = 14
"""bfloat16 weights, and float32 weights and two moments."""
_SAMPLE = 64
"""Rollouts that are encoded to learn how many bytes a token takes on its way."""


@dataclass(frozen=True)
class ScalingRow:
    """One size of the world. Bytes are those of a step, on one rank.

    `selection_bytes`, `selection_messages`: of the phase "select" on a rank of the last stage, without the exchange of
    selected rows. `exchange_bytes`: that exchange. `rollout_bytes`: what the first rank sends to all others.
    `num_prompts`: that it reads, renders and hands to the engine. `gathered_bytes`: of the optimizer's state at a time,
    on its GPU, while a checkpoint is saved. `num_communicators`, `num_peers`: process groups in which a rank sends, and
    the ranks in them. `num_sockets`: of a rank over gloo: a mesh of the world and of its replicas.
    """

    world_size: int
    dp_size: int
    selection_bytes: float
    selection_messages: float
    exchange_bytes: float
    rollout_bytes: float
    num_prompts: int
    gathered_bytes: int
    num_communicators: int
    num_peers: int
    num_sockets: int
    checkpoint_bytes: int


def scaling_rows(config: Config, device: Device, *, gpus_per_node: int) -> Iterator[ScalingRow]:
    """Yields a row per world size that the layouts fill; the configured number of prompts is that of the smallest.

    Raises:
        ConfigError: the layouts fill none of the sizes. For other errors see `make_plan`.
    """
    sizes = [size for size in WORLD_SIZES if size % gpus_per_node == 0]
    unit = config.model.tensor_parallel_size * config.model.pipeline_parallel_size
    other = config.teacher.tensor_parallel_size * config.teacher.pipeline_parallel_size
    sizes = [size for size in sizes if size % unit == 0 and size % other == 0]
    if not sizes:
        raise ConfigError(f"--scaling: expected layouts that fill one of {WORLD_SIZES} ranks; change --gpus-per-node")
    for size in sizes:
        sections = config.model_dump()
        sections["rollout"]["prompts_per_step"] *= size // sizes[0]
        grown = Config.model_validate(sections)
        hosts = planned_hosts(grown, size // gpus_per_node, gpus_per_node, device)
        yield _row(make_plan(grown, hosts, device, batches=("typical",)))


def _row(plan: Plan) -> ScalingRow:
    rank, grid = plan.ranks[0], plan.outline.student_grid  # the first is one of the last stage
    selecting = {
        key: one for key, one in rank.account.traffic().items() if key.phase == "select" and len(key.ranks) > 1
    }
    sent = {route: one for route, one in selecting.items() if route.operation == "all_to_all"}
    decided = [one for route, one in selecting.items() if route not in sent]
    rollouts = assumed_rollouts(plan.config, longest=False)
    groups = _groups_used(rank.account)
    gathers = plan.config.optimizer.distributed and grid.dp_size > 1
    return ScalingRow(
        world_size=grid.world_size,
        dp_size=grid.dp_size,
        selection_bytes=sum(one.num_bytes for one in decided),
        selection_messages=sum(one.num_messages for one in decided),
        exchange_bytes=sum(one.num_bytes for one in sent.values()) * rank.scale,
        rollout_bytes=_encoded_bytes(rollouts),
        num_prompts=plan.config.rollout.prompts_per_step,
        gathered_bytes=grid.dp_size * GATHERED_BYTES * gathers,
        num_communicators=len(groups),
        num_peers=len(set().union(*groups)) - 1,
        num_sockets=grid.world_size - 1 + grid.dp_size - 1,
        checkpoint_bytes=num_parameters(plan.outline.student.architecture) * CHECKPOINT_BYTES_PER_PARAMETER,
    )


def _encoded_bytes(rollouts: list[Rollout]) -> float:
    """Returns the bytes of the rollouts as the first rank sends them."""
    sample = rollouts[:_SAMPLE]
    per_token = len(encode_rollouts(sample)) / sum(one.num_tokens for one in sample)
    return per_token * sum(one.num_tokens for one in rollouts)


def _groups_used(account: Account) -> set[tuple[int, ...]]:
    """Returns the ranks of each group of several in which the rank sends after the set-up."""
    return {route.ranks for route in account.traffic() if len(route.ranks) > 1 and route.phase != BUILD}


def scaling_lines(rows: Iterator[ScalingRow]) -> Iterator[str]:
    """Yields the table for people, of 80 columns."""
    titles = ("ranks", "dp", "select", "calls", "rows", "rollouts", "prompts", "gather", "groups", "peers", "sockets")
    units = ("", "", "KiB", "", "MiB", "MiB", "", "MiB", "", "", "")
    yield "".join(f"{title:>{_width(title)}}" for title in titles)
    yield "".join(f"{unit:>{_width(title)}}" for title, unit in zip(titles, units, strict=True)).rstrip()
    size = 0
    for row in rows:
        size = row.checkpoint_bytes
        cells = (
            *(f"{row.world_size:,}", str(row.dp_size), f"{row.selection_bytes / 2**10:.1f}"),
            *(f"{row.selection_messages:.0f}", f"{row.exchange_bytes / 2**20:.1f}"),
            *(f"{row.rollout_bytes / 2**20:.0f}", f"{row.num_prompts:,}", f"{row.gathered_bytes / 2**20:,.0f}"),
            *(str(row.num_communicators), f"{row.num_peers:,}", f"{row.num_sockets:,}"),
        )
        yield "".join(f"{cell:>{_width(title)}}" for title, cell in zip(titles, cells, strict=True))
    yield f"a checkpoint: {size / 2**30:.0f} GiB, whatever the number of ranks"


def _width(title: str) -> int:
    return max(6, len(title) + 1)
