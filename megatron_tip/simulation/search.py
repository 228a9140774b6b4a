"""The search for a layout: of the layouts that fit, the few that are fastest by formulas, simulated by `make_plan`."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

from megatron_tip.errors import ConfigError
from megatron_tip.planning.plan import Outline
from megatron_tip.simulation.layouts import Layout, layouts
from megatron_tip.simulation.narrowing import Narrowing, Site
from megatron_tip.simulation.plan import TYPICAL, Plan, make_plan, planned_hosts
from megatron_tip.simulation.supported import check_simulated

NUM_BEST = 5
"""Layouts that a search prints."""
_NUM_SIMULATED = NUM_BEST
"""Layouts that are simulated beside the configured one, if they fit."""
_MOST_SIMULATED = 8
"""The same with those that turn out not to fit."""
_NUM_MISFITS = 3


@dataclass(frozen=True)
class Simulated:
    """A layout that fits, as overrides of the configuration, and its plan."""

    overrides: list[str]
    plan: Plan


@dataclass(frozen=True)
class TooLarge:
    """A layout that does not fit, as overrides of the configuration, and the bytes that it lacks."""

    overrides: list[str]
    missing_bytes: float


@dataclass(frozen=True)
class Search:
    """What a search found. `configured`: the plan of the configuration as it is, or why it cannot run.

    `best`: the fastest first. `too_large`: the closest to fitting first. `num_layouts`: that were ranked by formulas;
    `num_estimated` of them were estimated and `num_simulated` simulated.
    """

    configured: Plan | ConfigError
    best: list[Simulated]
    too_large: list[TooLarge]
    num_layouts: int
    num_estimated: int
    num_simulated: int


def search_layouts(site: Site, say: Callable[[str], None]) -> Search:
    """Returns the fastest layouts of the run that `site` configures. `say`: takes lines about the progress.

    Raises:
        ConfigError: `train` refuses every layout, or a plan does not simulate the run.
    """
    config = site.config
    like = _any_outline(site)
    check_simulated(config)
    narrowing = Narrowing(site, like)
    say("ranking the layouts by formulas")
    candidates = [one.layout for one in islice(narrowing.candidates(), _MOST_SIMULATED)]
    say(f"ranked {narrowing.num_layouts:,} layouts by formulas and estimated the memory of {narrowing.num_estimated:,}")
    say("simulating the configuration as it is")
    configured = _planned(site, [])
    fitting, too_large, num_simulated = _simulated(site, candidates, configured, say)
    say(f"simulated {num_simulated} layouts beside the configured one")
    fitting.sort(key=lambda one: one.plan.step_seconds(TYPICAL))
    too_large += [TooLarge(one.layout.overrides(config), one.missing_bytes) for one in narrowing.misfits.values()]
    too_large.sort(key=lambda one: one.missing_bytes)
    return Search(
        configured=configured,
        best=fitting[:NUM_BEST],
        too_large=too_large[:_NUM_MISFITS],
        num_layouts=narrowing.num_layouts,
        num_estimated=narrowing.num_estimated,
        num_simulated=num_simulated,
    )


def _simulated(
    site: Site,
    candidates: Sequence[Layout],
    configured: Plan | ConfigError,
    say: Callable[[str], None],
) -> tuple[list[Simulated], list[TooLarge], int]:
    """Returns those of the candidates that fit and those that do not, and how many were simulated for that."""
    fitting: list[Simulated] = []
    too_large: list[TooLarge] = []
    num_simulated = 0
    for layout in candidates:
        overrides, planned = layout.overrides(site.config), configured
        if overrides:
            num_simulated += 1
            say(f"simulating layout {num_simulated}, of at most {len(candidates)}: {' '.join(overrides)}")
            planned = _planned(site, overrides)
        if isinstance(planned, Plan) and planned.fits:
            fitting.append(Simulated(overrides, planned))
        elif isinstance(planned, Plan):
            too_large.append(TooLarge(overrides, planned.missing_bytes))
        if len(fitting) == _NUM_SIMULATED:
            break
    return fitting, too_large, num_simulated


def _planned(site: Site, overrides: Sequence[str]) -> Plan | ConfigError:
    """Returns the plan of the run with these overrides, or why it cannot run."""
    config = site.configure(overrides)
    try:
        hosts = planned_hosts(config, site.nodes, site.gpus_per_node)
        return make_plan(config, hosts, site.device, num_processes=site.num_processes)
    except ConfigError as refusal:
        return refusal


def _any_outline(site: Site) -> Outline:
    """Returns the outline of the configuration as it is or, if `train` refuses that, of the first layout that it takes.

    Raises:
        ConfigError: it refuses all; the error is that of the configuration as it is.
    """
    try:
        return site.outline(site.config)
    except ConfigError as refusal:
        every = {(one.shape, one.servers): one for one in layouts(site.config, site.gpus_per_node)}
        for layout in every.values():
            with suppress(ConfigError):
                return site.outline(site.with_layout(layout))
        raise refusal
