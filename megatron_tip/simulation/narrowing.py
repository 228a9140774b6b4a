"""The narrowing of a search: of all layouts, the few that fit and are fastest by formulas, without a simulation.

Layouts are looked at in the order of a lower bound of their time (`RoughTime`, as if they took one pass and moved
nothing), until as many as asked for are known to be faster than the bounds of all others. Only those that are looked at
are checked as `train` would, and estimated as `train --dry-run` would.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import heapify, heappop, heappush

from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.config import Config
from megatron_tip.errors import ConfigError
from megatron_tip.machine import Machine
from megatron_tip.placement.placement import place
from megatron_tip.planning.memory_estimate import MemoryEstimate, estimate_memory
from megatron_tip.planning.passes import plan_passes
from megatron_tip.planning.plan import Outline, outline_run
from megatron_tip.simulation.assumptions import assumed_rollouts
from megatron_tip.simulation.device import Device
from megatron_tip.simulation.layouts import Layout, Pair, Servers, Shape, layouts, offloads, token_limits
from megatron_tip.simulation.plan import planned_hosts
from megatron_tip.simulation.rank import step_batch
from megatron_tip.simulation.rough_time import RoughTime
from megatron_tip.simulation.timing import generation_of

_KEPT, _KEPT_WITHOUT_MLP = 1.4, 1.8
"""What simulated layers keep for the backward pass, of what the formulas count; the second if the feed-forward networks
are recomputed, so that what the formulas leave out (inputs of the norms of queries and keys, a copy of the attention's
result) weighs more. In the 14B recipe it was 1.3, and 1.7 to 1.8.
"""


@dataclass(frozen=True)
class Candidate:
    """A layout that fits by the formulas of `train --dry-run`. `seconds`: of a typical step, roughly."""

    layout: Layout
    seconds: float


@dataclass(frozen=True)
class Misfit:
    """A layout that lacks so many bytes."""

    layout: Layout
    missing_bytes: float


@dataclass(frozen=True)
class Site:
    """What a search plans for.

    `configure`: returns the run's configuration with further overrides. `num_processes`: as for `make_plan`.
    """

    configure: Callable[[Sequence[str]], Config]
    device: Device
    nodes: int
    gpus_per_node: int
    num_processes: int = 1

    @cached_property
    def config(self) -> Config:
        """The configuration as it is."""
        return self.configure([])

    def with_layout(self, layout: Layout) -> Config:
        """Returns the configuration with this layout.

        Raises:
            ConfigError: it cannot have it.
        """
        return self.configure(layout.overrides(self.config))

    def outline(self, config: Config, like: Outline | None = None) -> Outline:
        """Returns the outline of `config` on these nodes; for `like` and errors see `outline_run`."""
        hosts = planned_hosts(config, self.nodes, self.gpus_per_node)
        return outline_run(config, hosts.workers, Machine(is_elsewhere=True), hosts, reads_prompts=False, like=like)


class Narrowing:
    """The walk over all layouts in the order of their rough time.

    `num_layouts`: that there are. `num_estimated`: those whose memory was estimated. `misfits`: of each pair of sizes
    that was looked at and does not fit, the layout that lacks the least.
    """

    def __init__(self, site: Site, like: Outline) -> None:
        """Begins the walk. `like`: an outline of the run in any layout that `train` accepts."""
        self.num_layouts = self.num_estimated = 0
        self.misfits: dict[Pair, Misfit] = {}
        self._site, self._like, self._config = site, like, site.config
        self._rollouts = assumed_rollouts(self._config, longest=False)
        self._outlines: dict[tuple[Shape, Servers], Outline | None] = {}
        self._batches: dict[tuple[int, ...], StepBatch] = {}
        self._roughs: dict[Servers, tuple[float, RoughTime] | None] = {}

    def candidates(self) -> Iterator[Candidate]:
        """Yields the fastest layout of each pair of sizes that fits, the fastest pair first."""
        queue: list[tuple[float, int, Layout | Candidate]] = []
        for layout in layouts(self._config, self._site.gpus_per_node):
            seconds = self._seconds(layout, takes_one_pass=self._may_take_one_pass(layout))
            if seconds is not None:
                queue.append((seconds, len(queue), layout))
        heapify(queue)
        self.num_layouts = len(queue)
        done: set[Pair] = set()
        while queue:
            _, order, one = heappop(queue)
            pair = one.layout.pair if isinstance(one, Candidate) else one.pair
            if pair in done:
                continue
            if isinstance(one, Candidate):
                done.add(pair)
                self.misfits.pop(pair, None)
                yield one
            elif candidate := self._candidate(one):
                heappush(queue, (candidate.seconds, order, candidate))

    def _candidate(self, layout: Layout) -> Candidate | None:
        """Returns the layout with as little offload as it fits with; None if it cannot run or does not fit."""
        outline = self._outline(layout)
        if outline is None:
            return None
        for offload in offloads(self._config):
            chosen = replace(layout, offload=offload)
            try:
                config = self._site.with_layout(chosen)
            except ConfigError:
                return None
            memory = self._estimate(config, outline, chosen)
            if memory is not None:
                return Candidate(chosen, self._seconds_of(config, outline, chosen, memory))
        return None

    def _estimate(self, config: Config, outline: Outline, layout: Layout) -> MemoryEstimate | None:
        """Returns the memory of a layout, or None if it does not fit, and notes what is missing."""
        device = self._site.device
        memory = estimate_memory(config, outline, gpu_memory_gib=device.memory_gib)
        self.num_estimated += 1
        missing = needed_bytes(memory, layout.recomputed) - device.memory_bytes
        if missing <= 0:
            return memory
        known = self.misfits.get(layout.pair)
        if known is None or missing < known.missing_bytes:
            self.misfits[layout.pair] = Misfit(layout, missing)
        return None

    def _outline(self, layout: Layout) -> Outline | None:
        """Returns the outline for these sizes and servers; None if `train` refuses them or they can never fit."""
        key = (layout.shape, layout.servers)
        if key not in self._outlines:
            self._outlines[key] = self._checked(self._leanest(layout))
        return self._outlines[key]

    def _checked(self, layout: Layout) -> Outline | None:
        """Returns the outline of a layout that can run and fits."""
        try:
            config = self._site.with_layout(layout)
            outline = self._site.outline(config, self._like)
        except ConfigError:
            return None
        return outline if self._estimate(config, outline, layout) is not None else None

    def _leanest(self, layout: Layout) -> Layout:
        """Returns the layout of these sizes and servers that takes the least memory."""
        return replace(
            layout,
            max_tokens=min(token_limits(self._config)),
            recomputed=("layer",),
            offload=offloads(self._config)[-1],
        )

    def _seconds_of(self, config: Config, outline: Outline, layout: Layout, memory: MemoryEstimate) -> float:
        """Returns the rough time with the number of passes and the offload that the layout takes."""
        device = self._site.device
        passes = plan_passes(config, outline, memory_gib=device.memory_gib, on_gpu=True)
        student, teacher = layout.student, layout.teacher
        key = (student.tp, student.cp, student.pp, teacher.tp, teacher.cp, layout.max_tokens)  # all that it depends on
        if key not in self._batches:
            self._batches[key] = step_batch(config, outline, self._rollouts)
        seconds = self._seconds(layout, takes_one_pass=passes.suits(self._batches[key]))
        assert seconds is not None, "servers that cannot be placed are not in the queue"
        # What is in host memory leaves and returns once in a step.
        return seconds + 2 * memory.host_bytes / (device.host_gb_per_s * 1e9 * device.link_share)

    def _may_take_one_pass(self, layout: Layout) -> bool:
        return layout.student.pp == 1 and self._config.selection.passes != "two"

    def _seconds(self, layout: Layout, *, takes_one_pass: bool) -> float | None:
        """Returns the rough time without offload; None if the servers cannot be placed."""
        if layout.servers not in self._roughs:
            self._roughs[layout.servers] = self._rough(layout.servers)
        found = self._roughs[layout.servers]
        if found is None:
            return None
        generating, rough = found
        training = rough.step_seconds(layout, takes_one_pass=takes_one_pass)
        return max(training, generating) if self._config.rollout.ahead else training + generating

    def _rough(self, servers: Servers) -> tuple[float, RoughTime] | None:
        """Returns the time of generation and the rough time of the rest with these servers; None: impossible ones."""
        site = self._site
        try:
            config = site.with_layout(replace(Layout.of(self._config), servers=servers))
            hosts = planned_hosts(config, site.nodes, site.gpus_per_node)
            outline = replace(self._like, placement=place(config, hosts))
        except ConfigError:
            return None
        generating = generation_of(config, outline, site.device, self._rollouts).seconds
        models = (outline.student.architecture, outline.teaching.architecture)
        rough = RoughTime(config, *models, site.device, hosts.workers, hosts.workers_per_node, self._rollouts)
        return generating, rough


def needed_bytes(memory: MemoryEstimate, recomputed: Sequence[str]) -> float:
    """Returns the bytes of the fullest phase, with as much kept for the backward pass as simulated layers keep."""
    share = _KEPT_WITHOUT_MLP if "mlp" in recomputed else _KEPT
    return max(
        sum(size * (share if name.startswith("student: activations") else 1) for name, size in parts.items())
        for parts in memory.phases.values()
    )
