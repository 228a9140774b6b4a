from types import SimpleNamespace
from typing import get_args

import pytest

from megatron_tip.config import RolloutConfig
from megatron_tip.errors import ConfigError
from megatron_tip.machine import Machine
from megatron_tip.records import Prompt, Rollout
from megatron_tip.rollout.ahead import AheadEngine
from megatron_tip.rollout.engine import EngineNeeds, RolloutEngine, SamplingParams
from megatron_tip.rollout.engines import ENGINES, EngineKind, build_engine, engine_kind
from megatron_tip.rollout.multi_turn import MultiTurnEngine
from megatron_tip.rollout.replay_engine import ReplayEngine
from tests.helpers.tiny_tokenizer import make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()


class ToyEngine(RolloutEngine):
    """All that a new engine must have."""

    def generate(self, prompts, sampling):
        return [Rollout(prompt.index, 0, prompt.prompt_ids, (5,), (0.0,), "length", 0) for prompt in prompts]

    def update_weights(self, weights, weight_version):
        pass


def config_of(tmp_path, **rollout):
    return SimpleNamespace(
        rollout=RolloutConfig.model_construct(**rollout), run=SimpleNamespace(folder=tmp_path / "run")
    )


def needs_of(tmp_path, **rollout) -> EngineNeeds:
    others = {"student": None, "placement": None, "vocab_size": 300, "device": "cpu", "num_threads": 1, "dtype": None}
    config = config_of(tmp_path, **rollout)
    return EngineNeeds(config=config, tokenizer=TOKENIZER, stop_token_ids=(2,), weights_dtype=None, **others)


def replayed(tmp_path):
    """A folder with the rollouts of an earlier run."""
    folder = tmp_path / "earlier"
    folder.mkdir(parents=True)
    (folder / "step_000001.jsonl").write_text("")
    return folder


def test_every_engine_of_the_configuration_has_a_row():
    assert set(ENGINES) == set(get_args(RolloutConfig.model_fields["engine"].annotation))


def test_a_new_engine_is_a_class_and_a_row(tmp_path, monkeypatch):
    monkeypatch.setitem(ENGINES, "toy", EngineKind(lambda needs: ToyEngine()))
    needs = needs_of(tmp_path, engine="toy")
    engine_kind(needs.config).check(needs.config, (300, 300), Machine())
    engine = build_engine(needs)
    assert isinstance(engine, ToyEngine)
    engine.start_next([], SamplingParams(1, 1.0, 1.0, 1, (2,), 0))
    engine.wait()
    engine.distrust("nobody")
    assert (engine.input_logprobs([1]), engine.take_metrics("step_000001")) == ({}, {})
    engine.close()


def test_ahead_wraps_the_episodes_and_not_the_other_way_round(tmp_path, monkeypatch):
    monkeypatch.setitem(ENGINES, "toy", EngineKind(lambda needs: ToyEngine()))
    engine = build_engine(
        needs_of(tmp_path, engine="toy", ahead=1, environment="calculator", observation_role="user", max_turns=1)
    )
    assert isinstance(engine, AheadEngine)
    assert isinstance(engine._engine, MultiTurnEngine)
    sampling = SamplingParams(8, 1.0, 1.0, 1, (2,), 0, batch_name="step_000001")
    engine.start_next([Prompt(1, "", (4,))], sampling)
    assert [rollout.prompt_index for rollout in engine.generate([], sampling)] == [1]
    engine.close()


def test_what_is_replayed_has_its_turns_already(tmp_path):
    needs = needs_of(tmp_path, engine="replay", replay_folder=replayed(tmp_path), environment="calculator")
    assert isinstance(build_engine(needs), ReplayEngine)


def test_rollouts_to_replay_are_looked_for_where_the_run_will_be(tmp_path):
    folder = replayed(tmp_path)
    check = ENGINES["replay"].check
    check(config_of(tmp_path, engine="replay", replay_folder=folder), (300, 300), Machine())
    nothing = config_of(tmp_path, engine="replay", replay_folder=tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"rollout\.replay_folder: expected an existing path"):
        check(nothing, (300, 300), Machine())
    check(nothing, (300, 300), Machine(is_elsewhere=True))
    own = config_of(tmp_path, engine="replay", replay_folder=replayed(tmp_path / "run"))
    with pytest.raises(ConfigError, match="expected a folder of another run"):
        check(own, (300, 300), Machine())


def test_servers_must_not_sample_what_the_teacher_does_not_know(tmp_path):
    config = config_of(tmp_path, engine="sglang", server_urls=("http://a:1",), top_p=1.0)
    config.sglang = SimpleNamespace(router_url="", keys_file=None)
    ENGINES["sglang"].check(config, (300, 307), Machine())
    with pytest.raises(ConfigError, match="got 307 and 300 entries"):
        ENGINES["sglang"].check(config, (307, 300), Machine())
