from dataclasses import replace

import pytest
import torch

from megatron_tip.errors import EngineError
from megatron_tip.records import Prompt, Rollout
from megatron_tip.rollout.engine import SamplingParams
from megatron_tip.rollout.replay_engine import ReplayEngine
from megatron_tip.rollout.storage import write_rollouts

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
