"""The table of rollout engines. A new engine is a file with its class, a row here, and its name in `RolloutConfig`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_tip.config import Config
from megatron_tip.machine import Machine
from megatron_tip.rollout.ahead import AheadEngine
from megatron_tip.rollout.embedded.engine import build_embedded_engine
from megatron_tip.rollout.engine import EngineNeeds, RolloutEngine
from megatron_tip.rollout.multi_turn import with_environment
from megatron_tip.rollout.replay_engine import build_replay_engine, check_replay
from megatron_tip.rollout.sglang.setup import build_sglang_engine, check_served


def check_nothing(config: Config, vocab_sizes: Sequence[int], machine: Machine) -> None:
    """Refuses nothing."""


@dataclass(frozen=True)
class EngineKind:
    """What is known of an engine by its name, on every rank.

    `build`: makes it, in the first process. `check`: refuses, from files alone and before anything starts, what it
    cannot do; gets the configuration, the vocabulary sizes of student and teacher, and the machine. `generates`: False
    if it gives back whole rollouts of an earlier run: of whatever weights those were, with their turns, and new weights
    change nothing.
    `verifies_weights`: it has `input_logprobs`, by which a sync can be checked.
    """

    build: Callable[[EngineNeeds], RolloutEngine]
    check: Callable[[Config, Sequence[int], Machine], None] = check_nothing
    generates: bool = True
    verifies_weights: bool = False


ENGINES = {
    "embedded": EngineKind(build_embedded_engine),
    "sglang": EngineKind(build_sglang_engine, check_served, verifies_weights=True),
    "replay": EngineKind(build_replay_engine, check_replay, generates=False),
}
"""By the name in rollout.engine."""


def engine_kind(config: Config) -> EngineKind:
    """Returns the row of the configuration's engine."""
    return ENGINES[config.rollout.engine]


def build_engine(needs: EngineNeeds) -> RolloutEngine:
    """Returns the configuration's engine, in turns with an environment and a batch ahead where it asks for them."""
    kind, rollout = engine_kind(needs.config), needs.config.rollout
    engine = kind.build(needs)
    if kind.generates:
        engine = with_environment(engine, rollout, needs.tokenizer, needs.stop_token_ids)
    return AheadEngine(engine) if rollout.ahead else engine
