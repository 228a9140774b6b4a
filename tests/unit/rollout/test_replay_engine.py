import re
from dataclasses import replace

import pytest
import torch

from megatron_tip.config import Config
from megatron_tip.config.io import dump_config
from megatron_tip.errors import ConfigError, EngineError
from megatron_tip.machine import Machine
from megatron_tip.records import Prompt, Rollout
from megatron_tip.rollout.engine import SamplingParams
from megatron_tip.rollout.replay_engine import ReplayEngine, check_same_batches
from megatron_tip.rollout.storage import write_rollouts
from tests.helpers.training import Layout, make_config

PROMPTS = [Prompt(3, "a", (1, 2, 3)), Prompt(4, "b", (9,))]
ROLLOUTS = [
    Rollout(prompt.index, sample, prompt.prompt_ids, (5 + sample,), (-0.5,), "length", 6)
    for prompt in PROMPTS
    for sample in range(2)
]
SAMPLING = SamplingParams(
    max_response_tokens=8, temperature=1.0, top_p=1.0, samples_per_prompt=2, stop_token_ids=(2,), seed=1
)


@pytest.fixture
def engine(tmp_path) -> ReplayEngine:
    write_rollouts(tmp_path, "step_000002", ROLLOUTS, PROMPTS)
    write_rollouts(tmp_path, "heldout_000000", ROLLOUTS[::2], PROMPTS)
    return ReplayEngine(tmp_path)


def test_a_batch_is_given_back_with_its_own_weight_version(engine):
    stream = iter([("model.norm.weight", torch.ones(1))])
    engine.update_weights(stream, 12)
    assert next(stream, None) is None, "the stream must be consumed to its end"
    engine.health()
    assert engine.generate(PROMPTS, SAMPLING.for_step(2)) == ROLLOUTS
    assert engine.generate(PROMPTS, SAMPLING.for_heldout(0)) == ROLLOUTS[::2]


def test_a_step_that_was_not_recorded_is_named(engine):
    with pytest.raises(EngineError, match=r"step_000003\.jsonl does not exist"):
        engine.generate(PROMPTS, SAMPLING.for_step(3))


@pytest.mark.parametrize(
    "prompts, message",
    [
        (PROMPTS[::-1], "line 1: expected sample 0 of prompt 4, got sample 0 of prompt 3;"),
        ([PROMPTS[0], replace(PROMPTS[1], prompt_ids=(8,))], "line 3: .* of prompt 4 with other token ids"),
        (PROMPTS[:1], "expected 1 prompts x 2 samples, got 4 rollouts"),
    ],
)
def test_other_prompts_are_refused(engine, prompts, message):
    with pytest.raises(EngineError, match=message):
        engine.generate(prompts, SAMPLING.for_step(2))


def test_a_folder_without_rollouts_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(EngineError, match=r"found no \.jsonl file"):
            ReplayEngine(folder).health()
        with pytest.raises(EngineError, match=r"found no \.jsonl file"):
            ReplayEngine(folder).generate(PROMPTS, SAMPLING.for_step(1))


def replaying(folder, **sections) -> Config:
    """A configuration that replays `folder`/run/rollouts, in which a value of `sections` is a section's keys."""
    rollout = {"engine": "replay", "replay_folder": folder / "run" / "rollouts"} | sections.pop("rollout", {})
    return make_config(folder, Layout(1), rollout=rollout, **sections)


@pytest.mark.parametrize(
    "sections, key",
    [
        ({"heldout": {"num_prompts": 5}}, "heldout.num_prompts"),
        ({"run": {"seed": 9}}, "run.seed"),
        ({"rollout": {"prompts_per_step": 9}}, "rollout.prompts_per_step"),
        ({"training": {"steps": 9}}, "training.steps"),
    ],
)
def test_settings_that_change_the_prompts_are_refused_by_their_names(tmp_path, sections, key):
    """The earlier run's config.toml names all of them."""
    same = replaying(tmp_path)
    (tmp_path / "run" / "rollouts").mkdir(parents=True)
    (tmp_path / "run" / "config.toml").write_text(dump_config(same))
    check_same_batches(same, Machine())
    check_same_batches(replaying(tmp_path, selection={"retention_ratio": 0.5}), Machine())
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)}: expected .*, the value of the run whose rollouts"):
        check_same_batches(replaying(tmp_path, **sections), Machine())


def test_without_a_configuration_the_held_out_responses_are_counted(tmp_path):
    folder = tmp_path / "run" / "rollouts"
    write_rollouts(folder, "step_000001", ROLLOUTS, PROMPTS)
    check_same_batches(replaying(tmp_path, heldout={"num_prompts": 0}), Machine())
    with pytest.raises(ConfigError, match=r"^heldout\.num_prompts: expected 0, .*, got 2"):
        check_same_batches(replaying(tmp_path, heldout={"num_prompts": 2}), Machine())
    write_rollouts(folder, "heldout_000000", ROLLOUTS[::2], PROMPTS)
    check_same_batches(replaying(tmp_path, heldout={"num_prompts": 2}), Machine())
    with pytest.raises(ConfigError, match=r"^heldout\.num_prompts: expected 2, .*heldout_000000\.jsonl\), got 3"):
        check_same_batches(replaying(tmp_path, heldout={"num_prompts": 3}), Machine())
    check_same_batches(replaying(tmp_path / "elsewhere", heldout={"num_prompts": 3}), Machine(is_elsewhere=True))
