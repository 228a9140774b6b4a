from dataclasses import replace
from itertools import chain

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from megatron_tip.config import RolloutConfig
from megatron_tip.errors import ConfigError, EngineError, WeightsLostError
from megatron_tip.records import Prompt, Rollout
from megatron_tip.rollout.embedded.engine import EmbeddedEngine
from megatron_tip.rollout.engine import RolloutEngine, SamplingParams
from megatron_tip.rollout.environments.environment import Observation
from megatron_tip.rollout.environments.turn_template import TurnTemplate
from megatron_tip.rollout.multi_turn import MultiTurnEngine, check_environment, with_environment
from tests.helpers.tiny_tokenizer import make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()
STOP = 2
TEMPLATE = TurnTemplate.of(TOKENIZER, "user", [STOP])
SAMPLING = SamplingParams(
    max_response_tokens=90, temperature=1.0, top_p=1.0, samples_per_prompt=2, stop_token_ids=(STOP,), seed=1
)
PROMPTS = [Prompt(7, "one", (10, 11, 12)), Prompt(9, "two", (13,))]


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])


class ScriptedEngine(RolloutEngine):
    """Writes the next of `turns` behind every sequence, however often that comes; keeps the calls that it got."""

    def __init__(self, turns: list[str], *, weight_version: int = 4) -> None:
        self.turns = turns
        self.calls: list[tuple[list[Prompt], SamplingParams]] = []
        self.weight_version = weight_version

    def generate(self, prompts, sampling):
        text = self.turns[len(self.calls)]
        self.calls.append((list(prompts), sampling))
        whole = (*ids_of(text), STOP)
        ids = whole[: sampling.max_response_tokens]
        reason = "stop" if ids == whole else "length"
        logprobs = tuple(-1.0 - place for place in range(len(ids)))
        return [
            Rollout(prompt.index, sample, prompt.prompt_ids, ids, logprobs, reason, self.weight_version)
            for prompt in prompts
            for sample in range(sampling.samples_per_prompt)
        ]

    def update_weights(self, weights, weight_version):
        self.weight_version = weight_version


class Echo:
    """Says what it was told and which prompt it began with; done when told "bye"."""

    def reset(self, prompt: Prompt) -> None:
        self.prompt, self.heard = prompt, []

    def step(self, text: str) -> Observation:
        self.heard.append(text)
        return Observation(f"{self.prompt.text} {len(self.heard)} {text}", done=text == "bye")


def engine_of(turns: list[str], **options: int) -> tuple[MultiTurnEngine, ScriptedEngine]:
    inner = ScriptedEngine(turns)
    return MultiTurnEngine(inner, Echo, TEMPLATE, **({"max_turns": 8} | options)), inner


def test_an_episode_is_turns_and_observations_with_only_turns_generated():
    engine, inner = engine_of(["the fox", "a dog", "bye"])
    rollouts = engine.generate(PROMPTS, SAMPLING)
    assert [(r.prompt_index, r.sample_index) for r in rollouts] == [(7, 0), (7, 1), (9, 0), (9, 1)]
    for rollout, name in zip(rollouts, ["one", "one", "two", "two"], strict=True):
        turns = [(*ids_of(text), STOP) for text in ("the fox", "a dog", "bye")]
        seen = [TEMPLATE.observation_ids(f"{name} 1 the fox"), TEMPLATE.observation_ids(f"{name} 2 a dog")]
        parts = [turns[0], seen[0], turns[1], seen[1], turns[2]]
        assert rollout.response_ids == sum(parts, ())
        ends = [sum(map(len, parts[: n + 1])) for n in range(5)]
        assert rollout.environment_spans == ((ends[0], ends[1]), (ends[2], ends[3]))
        assert rollout.num_generated == sum(map(len, turns))
        logprobs = ([-1.0 - i for i in range(len(p))] if n % 2 == 0 else [0.0] * len(p) for n, p in enumerate(parts))
        assert rollout.rollout_logprobs == tuple(chain.from_iterable(logprobs))
        assert (rollout.finish_reason, rollout.weight_version) == ("stop", 4)
    for (before, _), (after, asked) in zip(inner.calls[1:], inner.calls[2:], strict=False):
        assert asked.samples_per_prompt == 1
        for old, new in zip(before, after, strict=True):
            assert new.prompt_ids[: len(old.prompt_ids)] == old.prompt_ids, "ids are appended, never made anew"
    assert len({call[1].seed for call in inner.calls}) == 3, "every turn draws with numbers of its own"


def test_a_turn_too_many_ends_as_turns():
    engine, _ = engine_of(["the fox", "a dog"], max_turns=2)
    rollout = engine.generate(PROMPTS[:1], SAMPLING)[0]
    assert rollout.finish_reason == "turns"
    assert len(rollout.environment_spans) == 1
    assert rollout.response_ids[-1] == STOP, "nothing is said to the last turn"


def test_a_budget_ends_an_episode_anywhere_with_a_generated_token():
    """Every budget: it ends within a turn, at its stop id, within an observation, right behind one."""
    whole = engine_of(["the fox", "a dog", "bye"])[0].generate(PROMPTS[:1], SAMPLING)[0]
    for budget in range(1, len(whole.response_ids)):
        sampling = SamplingParams(budget, 1.0, 1.0, 1, (STOP,), 1)
        got = engine_of(["the fox", "a dog", "bye"])[0].generate(PROMPTS[:1], sampling)[0]
        length = len(got.response_ids)
        assert got.response_ids == whole.response_ids[:length], "the same ids as without a budget"
        assert got.finish_reason == "length"
        in_observation = [start for start, end in whole.environment_spans if start <= budget <= end]
        assert length == (in_observation[0] if in_observation else budget)
        assert all(0 < start < end < length for start, end in got.environment_spans)


def test_a_short_sequence_is_not_cut_where_a_long_one_must_be():
    """The long prompt's room bounds the call; what is cut off before its own budget goes on."""
    prompts = [Prompt(1, "", (10,) * 40), Prompt(2, "", (10,))]

    class ByPrompt(ScriptedEngine):
        """The long prompt writes 20 tokens at first, the short one 1; later 35 and then a stop."""

        def generate(self, prompts, sampling):
            self.calls.append((list(prompts), sampling))
            parts = []
            for prompt in prompts:
                tokens = [20, *[10] * 34, STOP]
                if len(self.calls) == 1:
                    tokens = [*[10] * (19 if len(prompt.prompt_ids) == 40 else 0), STOP]
                elif prompt.prompt_ids[-1] == 10 and 20 in prompt.prompt_ids:  # cut off in mid-turn: the rest of it
                    written = len(prompt.prompt_ids) - prompt.prompt_ids.index(20)
                    tokens = tokens[written:]
                ids = tuple(tokens[: sampling.max_response_tokens])
                reason = "stop" if ids[-1] == STOP else "length"
                parts.append(Rollout(prompt.index, 0, prompt.prompt_ids, ids, (0.0,) * len(ids), reason, 0))
            assert max(len(p.prompt_ids) for p in prompts) + sampling.max_response_tokens <= 100, "the engine's limit"
            return parts

    class Curt(Echo):
        def step(self, text: str) -> Observation:
            return Observation("ok", done=False)

    inner = ByPrompt([])
    engine = MultiTurnEngine(inner, Curt, TEMPLATE, max_turns=2)
    long, short = engine.generate(prompts, SamplingParams(60, 1.0, 1.0, 1, (STOP,), 1))
    assert long.finish_reason == "length"
    assert len(long.response_ids) == 60
    assert short.finish_reason == "turns"
    assert len(inner.calls) == 3, "the short one was cut by the long one's room, and went on"
    assert short.response_ids[-36:] == (20, *[10] * 34, STOP)
    assert len(short.environment_spans) == 1


def test_an_embedded_engines_logprobs_are_those_of_the_whole_sequence():
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.05,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    stops = tuple(range(2, 300, 9))  # so that random text has ends of turns
    inner = EmbeddedEngine(config, batch_size=3)
    inner.update_weights(model.named_parameters(), 5)
    engine = MultiTurnEngine(inner, Echo, TurnTemplate.of(TOKENIZER, "user", stops), max_turns=3)
    sampling = SamplingParams(100, 1.0, 1.0, 3, stops, 3)
    rollouts = engine.generate(PROMPTS, sampling)
    assert rollouts == engine.generate(PROMPTS, sampling), "the seed decides"
    assert {len(r.environment_spans) for r in rollouts} >= {1, 2}, "the case must hold several turns"
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        with torch.no_grad():
            logprobs = model(ids).logits[0, len(rollout.prompt_ids) - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(rollout.response_ids)[:, None]).squeeze(1)
        for start, end in rollout.environment_spans:
            expected[start:end] = 0.0
        torch.testing.assert_close(torch.tensor(rollout.rollout_logprobs), expected, atol=1e-5, rtol=1e-5)


def test_the_oldest_weights_are_the_rollouts():
    class Synced(ScriptedEngine):
        def generate(self, prompts, sampling):
            self.weight_version -= 1
            return super().generate(prompts, sampling)

    engine = MultiTurnEngine(Synced(["the fox", "bye"]), Echo, TEMPLATE, max_turns=8)
    assert engine.generate(PROMPTS, SAMPLING)[0].weight_version == 2


class Broken(Echo):
    def step(self, text: str) -> Observation:
        raise RuntimeError("no network")


class Mute(Echo):
    def step(self, text: str):
        return "5"


@pytest.mark.parametrize(
    "environment, message",
    [(Broken, "environment Broken: step failed in turn 1 of sample 0 of prompt 7: .*no network"), (Mute, "got '5'")],
)
def test_an_environment_that_fails_is_named(environment, message):
    with pytest.raises(EngineError, match=message):
        MultiTurnEngine(ScriptedEngine(["a"]), environment, TEMPLATE, max_turns=2).generate(PROMPTS, SAMPLING)


def test_an_engine_that_answers_for_others_is_refused():
    class Forgetful(ScriptedEngine):
        def generate(self, prompts, sampling):
            rollouts = super().generate(prompts, sampling)
            return rollouts if len(self.calls) == 1 else [rollouts[2], *rollouts]

    with pytest.raises(EngineError, match=r"of each of 4 episodes .* got 5 rollouts, 4 of them for other prompts"):
        MultiTurnEngine(Forgetful(["a", "b"]), Echo, TEMPLATE, max_turns=3).generate(PROMPTS, SAMPLING)


def test_an_episode_that_the_engine_leaves_out_is_left_out():
    class Leaving(ScriptedEngine):
        def generate(self, prompts, sampling):
            rollouts = super().generate(prompts, sampling)
            return rollouts if len(self.calls) == 1 else [rollouts[0], *rollouts[2:]]

    engine = MultiTurnEngine(Leaving(["a", "bye"]), Echo, TEMPLATE, max_turns=3)
    prompts = [*PROMPTS, Prompt(11, "three", (15,))]
    rollouts = engine.generate(prompts, replace(SAMPLING, samples_per_prompt=1))
    assert [rollout.prompt_index for rollout in rollouts] == [7, 11]
    assert all(rollout.finish_reason == "stop" for rollout in rollouts)


def test_a_batch_goes_on_where_its_weights_were_lost():
    class Losing(ScriptedEngine):
        lost = False

        def generate(self, prompts, sampling):
            if len(self.calls) == 2 and not self.lost:
                self.lost = True
                raise WeightsLostError("gone")
            return super().generate(prompts, sampling)

    inner = Losing(["the fox", "a dog", "bye"])
    engine = MultiTurnEngine(inner, Echo, TEMPLATE, max_turns=8)
    with pytest.raises(WeightsLostError):
        engine.generate(PROMPTS, SAMPLING)
    assert engine.generate(PROMPTS, SAMPLING) == engine_of(["the fox", "a dog", "bye"])[0].generate(PROMPTS, SAMPLING)
    assert len({sampling.batch_name for _, sampling in inner.calls}) == 3, "an engine tells the calls of a batch apart"


def test_weights_are_the_engines_own():
    engine, inner = engine_of([])
    engine.update_weights([], 12)
    assert inner.weight_version == 12


def test_the_configuration_names_an_environment():
    inner = ScriptedEngine(["<answer>1</answer>"])
    assert with_environment(inner, RolloutConfig(), TOKENIZER, [STOP]) is inner
    config = RolloutConfig(environment=f"{__name__}:Echo", max_turns=1, observation_role="user")
    rollout = with_environment(inner, config, TOKENIZER, [STOP]).generate(PROMPTS, SAMPLING)[0]
    assert rollout.finish_reason == "turns"


@pytest.mark.parametrize(
    "environment, message",
    [
        ("calculater", "got 'calculater'; the nearest name is 'calculator'"),
        ("nowhere:Thing", "cannot import 'nowhere:Thing'"),
        ("math:pi", r"class with the methods reset and step, got float without \['reset', 'step'\]"),
    ],
)
def test_an_environment_that_is_none_is_refused_before_anything_starts(environment, message):
    with pytest.raises(ConfigError, match=message):
        check_environment(RolloutConfig(environment=environment), TOKENIZER, [STOP])
