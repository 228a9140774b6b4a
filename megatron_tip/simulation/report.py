"""A plan as text of 80 columns, and as values for JSON."""

from collections.abc import Sequence
from typing import Any

from megatron_tip.placement.table import table_of
from megatron_tip.simulation.plan import Plan, PlannedRank
from megatron_tip.simulation.shares import Variation, share_lines
from megatron_tip.simulation.timing import PER_TOKEN, STEP_PHASES

_GIB = 2**30


def as_text(plan: Plan, shares: Sequence[Variation] = ()) -> str:
    """Returns the plan as a table for people. `shares`: of the phases, in changed configurations."""
    device = plan.device
    lines = [
        f"{plan.hosts.workers} x {device.name}, {plan.hosts.workers_per_node} per node",
        plan.outline.grids_in_words(),
        *(table_of(plan.outline.placement) if plan.outline.placement.servers else []),
        "",
        *_memory_lines(plan),
        "",
        *(line for batch in plan.generation for line in _time_lines(plan, batch)),
        *_traffic_lines(plan),
        "",
        *([*share_lines(shares), ""] if shares else []),
        f"device: {device.source}",
        "assumed: devices.toml, shares of the peaks reached; docs/plan.md, the batches",
        *(f"not checked here: {note}" for note in plan.notes),
    ]
    return "\n".join(wrapped for line in lines for wrapped in wrap_line(line))


def as_values(plan: Plan, shares: Sequence[Variation] = ()) -> dict[str, Any]:
    """Returns the plan as JSON values; bytes, seconds and floating-point operations of a whole step."""
    return {
        **({"shares": [vars(one) for one in shares]} if shares else {}),
        "device": plan.device.name,
        "world_size": plan.hosts.workers,
        "workers_per_node": plan.hosts.workers_per_node,
        "student": vars(plan.outline.student_grid),
        "teacher": vars(plan.outline.teacher_grid),
        "fits": plan.fits,
        "missing_bytes": max(0.0, plan.missing_bytes),
        "batches": {batch: _batch_values(plan, batch) for batch in plan.generation},
        "ranks": [_rank_values(rank) for rank in plan.ranks],
        "notes": plan.notes,
    }


def _batch_values(plan: Plan, batch: str) -> dict[str, Any]:
    generation, seconds = plan.generation[batch], plan.step_seconds(batch)
    return {
        "response_tokens": generation.num_tokens,
        "step_seconds": seconds,
        "response_tokens_per_second": generation.num_tokens / seconds,
        "gpu_hours": plan.gpu_hours(batch),
        "phase_seconds": {"rollout": generation.seconds, **plan.phase_seconds(batch)},
        "bubble": plan.bubble(batch),
    }


def _rank_values(rank: PlannedRank) -> dict[str, Any]:
    return {
        "rank": rank.kind.rank,
        "stages": rank.kind.stages,
        "count": rank.kind.count,
        "beside": rank.kind.beside,
        "batch": rank.batch,
        "peak_phase": rank.peak_phase,
        "peak_bytes": rank.peak_bytes,
        "live_bytes": rank.live,
        "matrix_flops": {phase: rank.flops(phase) for phase in STEP_PHASES},
        "message_bytes": [
            {"phase": phase, "group": group, "between_nodes": between, "bytes": num_bytes}
            for (phase, group, between), num_bytes in rank.message_bytes().items()
        ],
        "host_syncs": {
            phase: rank.account.host_syncs(phase) * (rank.scale if phase in PER_TOKEN else 1) for phase in STEP_PHASES
        },
        "seconds": rank.seconds,
    }


def _memory_lines(plan: Plan) -> list[str]:
    limit, fullest = plan.device.usable_bytes / _GIB, plan.fullest
    state = "fits" if plan.fits else f"does NOT fit: {plan.missing_bytes / _GIB:.1f} GiB are missing"
    lines = [f"memory: {state} ({plan.device.memory_gib:g} GiB less a tenth: {limit:.1f} GiB)", ""]
    lines.append("at the peak, by kind of rank (how many):")
    for kind in dict.fromkeys(rank.kind for rank in plan.ranks):
        peaks = [
            f"{rank.batch} batch {rank.peak_bytes / _GIB:.1f} GiB in {rank.peak_phase}"
            for rank in plan.ranks
            if rank.kind == kind
        ]
        lines += [str(kind), f"    {', '.join(peaks)}"]
    lines += ["", f"the fullest: rank {fullest.kind.rank}, {fullest.batch} batch, in {fullest.peak_phase}"]
    parts = sorted(fullest.live[fullest.peak_phase].items(), key=lambda part: -part[1])
    return lines + [f"{size / _GIB:>8.2f} GiB  {name}" for name, size in parts if size >= 0.005 * _GIB]


def _time_lines(plan: Plan, batch: str) -> list[str]:
    generation, total = plan.generation[batch], plan.step_seconds(batch)
    phases = {"rollout": generation.seconds, **plan.phase_seconds(batch)}
    slowest = max(phases, key=lambda name: phases[name])
    rate = generation.num_tokens / total
    return [
        f"{batch} batch: {total:.1f} s a step, bound by {slowest}; {rate:,.0f} response tokens/s,",
        f"  {plan.gpu_hours(batch):,.0f} GPU hours for {plan.config.training.steps} steps, "
        f"pipeline bubble {100 * plan.bubble(batch):.0f} %",
        "  " + "  ".join(f"{name} {seconds:.1f} s" for name, seconds in phases.items()),
        "",
    ]


def largest_messages(plan: Plan, most: int = 10) -> list[tuple[tuple[str, str, bool], float]]:
    """Returns the bytes of the first batch's messages on the rank that has the most, the largest first.

    The keys are phase, group and whether they leave their node.
    """
    first = next(iter(plan.generation))
    totals: dict[tuple[str, str, bool], float] = {}
    for rank in plan.ranks:
        if rank.batch == first:
            for key, num_bytes in rank.message_bytes().items():
                totals[key] = max(totals.get(key, 0.0), num_bytes)
    return sorted(totals.items(), key=lambda item: -item[1])[:most]


def _traffic_lines(plan: Plan) -> list[str]:
    first = next(iter(plan.generation))
    lines = [f"{f'messages of a step, {first} batch, most of a rank':<44}{'GiB':>10}"]
    for (phase, group, between), num_bytes in largest_messages(plan):
        link = "between nodes" if between else "within a node"
        lines.append(f"  {phase:<10}{group:<22}{link:<14}{num_bytes / _GIB:>6.2f}")
    return lines


def wrap_line(line: str) -> list[str]:
    """Returns the line in parts of at most 80 columns, cut at spaces."""
    parts = []
    while len(line) > 80:
        cut = line.rfind(" ", 0, 80)
        if cut <= 4:
            break
        parts.append(line[:cut])
        line = "    " + line[cut + 1 :]
    return [*parts, line]
