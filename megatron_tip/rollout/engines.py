"""The table of rollout engines. A new engine needs a file with its class, a row here, and a name in `RolloutConfig`."""

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
    """The facts about a kind of engine that every rank knows.

    `build`: creates the engine, in the first process. `check`: refuses unsupported settings before anything starts, by
    reading files only; takes the configuration, the vocabulary sizes of student and teacher, and the machine.
    `generates`: False if it returns whole rollouts of an earlier run, which new weights do not change.
    `verifies_weights`: it implements `input_logprobs`, which can verify a sync.
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
"""The kinds of engines by the name in rollout.engine."""


def engine_kind(config: Config) -> EngineKind:
    """Returns the kind of the configured engine."""
    return ENGINES[config.rollout.engine]


def build_engine(needs: EngineNeeds) -> RolloutEngine:
    """Returns the configured engine, with an environment and one batch ahead if configured."""
    kind, rollout = engine_kind(needs.config), needs.config.rollout
    engine = kind.build(needs)
    if kind.generates:
        engine = with_environment(engine, rollout, needs.tokenizer, needs.stop_token_ids)
    return AheadEngine(engine) if rollout.ahead else engine
