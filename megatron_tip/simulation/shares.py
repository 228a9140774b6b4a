"""The phases' shares of a step with other budgets, response lengths and servers than the configured ones."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_tip.errors import ConfigError
from megatron_tip.placement.placement import place
from megatron_tip.simulation.assumptions import assumed_rollouts
from megatron_tip.simulation.layouts import Layout, server_choices
from megatron_tip.simulation.narrowing import Site
from megatron_tip.simulation.plan import TYPICAL, Plan, make_plan, planned_hosts
from megatron_tip.simulation.timing import generation_of

_RATIOS = (0.01, 0.05, 0.1, 1.0)
_LENGTHS = (0.5, 2.0)
"""Of `rollout.max_response_tokens` as configured."""
_PHASES = ("rollout", "teacher", "score", "train", "others")


@dataclass(frozen=True)
class Variation:
    """The step of a changed configuration. `seconds`: by phase, rollout included. `refusal`: why it cannot run."""

    name: str
    step_seconds: float = 0.0
    seconds: dict[str, float] | None = None
    refusal: str = ""

    @property
    def shares(self) -> dict[str, float]:
        """The share of each phase in their sum; the small ones together."""
        assert self.seconds is not None, "a refused configuration has no step"
        total = sum(self.seconds.values())
        shares = {phase: self.seconds[phase] / total for phase in _PHASES[:-1]}
        return shares | {_PHASES[-1]: 1 - sum(shares.values())}


def phase_shares(site: Site, configured: Plan, say: Callable[[str], None]) -> list[Variation]:
    """Returns the configured step and its variations; each is simulated, except other servers on the same GPUs.

    `say`: takes lines about the progress.
    """
    found = [_variation("as configured", configured)]
    for name, overrides in _changes(site):
        say(f"simulating {name}")
        found.append(_changed(site, name, overrides))
    return found + list(_other_servers(site, configured))


def _changes(site: Site) -> Iterator[tuple[str, list[str]]]:
    """Yields the changes that need a simulation, with their names."""
    config = site.config
    for ratio in _RATIOS:
        if ratio != config.selection.retention_ratio:
            yield f"{ratio:.0%} selected", [f"selection.retention_ratio={ratio}"]
    for times in _LENGTHS:
        length = max(1, int(times * config.rollout.max_response_tokens))
        yield f"responses up to {length:,}", [f"rollout.max_response_tokens={length}"]


def _changed(site: Site, name: str, overrides: list[str]) -> Variation:
    try:
        config = site.configure(overrides)
        hosts = planned_hosts(config, site.nodes, site.gpus_per_node)
        return _variation(name, make_plan(config, hosts, site.device, batches=(TYPICAL,)))
    except ConfigError as refusal:
        return Variation(name, refusal=str(refusal))


def _other_servers(site: Site, configured: Plan) -> Iterator[Variation]:
    """Yields the step with other numbers of servers on the same GPUs; only generation changes."""
    own, rollouts = Layout.of(site.config), assumed_rollouts(site.config, longest=False)
    for servers in server_choices(site.config, site.gpus_per_node):
        try:
            config = site.with_layout(replace(own, servers=servers))
            hosts = planned_hosts(config, site.nodes, site.gpus_per_node)
            outline = replace(configured.outline, placement=place(config, hosts))
        except ConfigError:
            continue
        if servers == own.servers or hosts != configured.hosts:
            continue  # with GPUs of their own, the trainer's world would be another: a search compares those
        generation = {TYPICAL: generation_of(config, outline, site.device, rollouts)}
        name = f"servers: {generation[TYPICAL].num_servers}"
        yield _variation(name, replace(configured, config=config, outline=outline, generation=generation))


def _variation(name: str, plan: Plan) -> Variation:
    seconds = {"rollout": plan.generation[TYPICAL].seconds, **plan.phase_seconds(TYPICAL)}
    return Variation(name, plan.step_seconds(TYPICAL), seconds)


def share_lines(variations: Sequence[Variation]) -> list[str]:
    """Returns a table of 80 columns: seconds of a step, and the share of each phase in per cent."""
    header = "".join(f"{phase:>8}" for phase in _PHASES)
    lines = [f"{f'{TYPICAL} batch, % of the time':<26}{'s':>6}{header}"]
    for one in variations:
        if one.seconds is None:
            lines.append(f"  {one.name:<24}refused: {one.refusal}")
        else:
            shares = "".join(f"{100 * share:>8.1f}" for share in one.shares.values())
            lines.append(f"  {one.name:<24}{one.step_seconds:>6.1f}{shares}")
    return lines
