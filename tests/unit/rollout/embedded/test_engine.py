from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from megatron_tip.errors import EngineError
from megatron_tip.records import Prompt, Rollout
from megatron_tip.rollout.embedded.engine import EmbeddedEngine
from megatron_tip.rollout.engine import SamplingParams
from megatron_tip.rollout.progress_clock import ProgressClock

VOCAB = 64
STOPS = (5, 9)


def tiny_config(**changes: object) -> LlamaConfig:
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
        "eos_token_id": 3,
    }
    return LlamaConfig(**(values | changes))


def reference_model(config: LlamaConfig) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def ready_engine(model: PreTrainedModel, **options: object) -> EmbeddedEngine:
    engine = EmbeddedEngine(model.config, **options)
    engine.update_weights(model.named_parameters(), 7)
    return engine


def prompts(*lengths: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(10, VOCAB, (length,), generator=generator).tolist() for length in lengths]
    return [Prompt(100 + i, "", tuple(prompt_ids)) for i, prompt_ids in enumerate(ids)]


def sampling(**changes: object) -> SamplingParams:
    values = {
        "max_response_tokens": 12,
        "temperature": 0.7,
        "top_p": 1.0,
        "samples_per_prompt": 3,
        "stop_token_ids": STOPS,
        "seed": 11,
    }
    return SamplingParams(**(values | changes))


def next_token_logits(model: PreTrainedModel, rollout: Rollout) -> Tensor:
    """[m, V]: of each response token, from one forward pass over the unpadded sequence."""
    ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
    with torch.no_grad():
        return model(ids).logits[0, len(rollout.prompt_ids) - 1 : -1].float()


def test_logprobs_are_the_models_own_at_the_sampling_temperature():
    model = reference_model(tiny_config())
    rollouts = ready_engine(model).generate(prompts(9, 2, 5), sampling())
    for rollout in rollouts:
        expected = torch.log_softmax(next_token_logits(model, rollout) / 0.7, dim=-1)
        expected = expected[torch.arange(len(rollout.response_ids)), list(rollout.response_ids)]
        torch.testing.assert_close(torch.tensor(rollout.rollout_logprobs), expected, atol=1e-5, rtol=1e-5)


def test_rollouts_are_prompt_major_and_end_at_a_stop_id():
    source = prompts(9, 2, 5)
    rollouts = ready_engine(reference_model(tiny_config()), batch_size=4).generate(source, sampling())
    assert [(r.prompt_index, r.sample_index) for r in rollouts] == [(100 + p, s) for p in range(3) for s in range(3)]
    assert [r.prompt_ids for r in rollouts] == [source[p].prompt_ids for p in range(3) for _ in range(3)]
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}, "the case must hold both"
    for rollout in rollouts:
        assert rollout.weight_version == 7
        assert len(rollout.rollout_logprobs) == len(rollout.response_ids)
        assert not set(rollout.response_ids[:-1]) & set(STOPS)
        if rollout.finish_reason == "stop":
            assert rollout.response_ids[-1] in STOPS
        else:
            assert len(rollout.response_ids) == 12
            assert rollout.response_ids[-1] not in STOPS


def test_the_checkpoints_own_end_token_does_not_stop_when_it_is_not_asked_for():
    rollouts = ready_engine(reference_model(tiny_config())).generate(
        prompts(4, 4, 4, 4), sampling(stop_token_ids=(), temperature=3.0, max_response_tokens=40)
    )
    assert any(3 in rollout.response_ids[:-1] for rollout in rollouts), "the case must sample the end token"
    assert all(len(rollout.response_ids) == 40 for rollout in rollouts)


def test_the_seed_decides_and_neither_batch_size_nor_global_state_does():
    model = reference_model(tiny_config())
    source = prompts(9, 2, 5, 5)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = ready_engine(model).generate(source, sampling())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = ready_engine(model, batch_size=5).generate(source, sampling())
    assert [r.response_ids for r in again] == [r.response_ids for r in first]
    other = ready_engine(model).generate(source, sampling(seed=12))
    assert [r.response_ids for r in other] != [r.response_ids for r in first]
    assert len({r.response_ids for r in first}) > 3, "samples of a prompt differ"


def test_threads_are_restored():
    before = torch.get_num_threads()
    ready_engine(reference_model(tiny_config()), num_threads=before + 1).generate(prompts(3), sampling())
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("tied", [True, False])
def test_new_weights_are_used(tied: bool):
    model = reference_model(tiny_config(tie_word_embeddings=tied))
    engine = ready_engine(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    engine.update_weights(model.named_parameters(), 8)
    for rollout in engine.generate(prompts(5), sampling(temperature=1.0)):
        assert rollout.weight_version == 8
        expected = torch.log_softmax(next_token_logits(model, rollout), dim=-1)
        expected = expected[torch.arange(len(rollout.response_ids)), list(rollout.response_ids)]
        torch.testing.assert_close(torch.tensor(rollout.rollout_logprobs), expected, atol=1e-5, rtol=1e-5)


def without(name: str, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    return ((n, p) for n, p in model.named_parameters() if n != name)


def test_weights_that_do_not_fit_are_named_and_the_engine_stops():
    model = reference_model(tiny_config())
    engine = ready_engine(model)
    with pytest.raises(EngineError, match=r"model\.norm\.weight: missing"):
        engine.update_weights(without("model.norm.weight", model), 8)
    with pytest.raises(EngineError, match="complete weights"):
        engine.generate(prompts(3), sampling())
    with pytest.raises(EngineError, match="surplus: no such parameter"):
        engine.update_weights([*model.named_parameters(), ("surplus", torch.zeros(1))], 8)
    broken = [(n, p[:1] if n == "model.norm.weight" else p) for n, p in model.named_parameters()]
    consumed = iter(broken)
    with pytest.raises(EngineError, match=r"model\.norm\.weight: expected shape \(32,\), got \(1,\)"):
        engine.update_weights(consumed, 8)
    assert next(consumed, None) is None, "the stream must be consumed to its end"
    engine.update_weights(model.named_parameters(), 9)
    assert engine.generate(prompts(3), sampling())[0].weight_version == 9


def test_no_weights_no_rollouts():
    engine = EmbeddedEngine(tiny_config())
    with pytest.raises(EngineError, match="complete weights"):
        engine.health()


def test_a_response_that_could_leave_the_models_positions_is_refused():
    with pytest.raises(EngineError, match=r"<= 64 tokens .*, got 53 \+ 12"):
        ready_engine(reference_model(tiny_config())).generate(prompts(53), sampling())


def test_weights_that_are_not_numbers_are_refused():
    model = reference_model(tiny_config())
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[3] = torch.nan
    with pytest.raises(EngineError, match="weights of version 7 produce NaN logits"):
        ready_engine(model).generate(prompts(3), sampling())


def test_no_prompts_no_rollouts():
    assert ready_engine(reference_model(tiny_config())).generate([], sampling()) == []


def test_bfloat16_generates_close_to_float32():
    model = reference_model(tiny_config(initializer_range=0.1))
    rollouts = ready_engine(model, dtype=torch.bfloat16).generate(prompts(9, 2, 5), sampling(temperature=1.0))
    for rollout in rollouts:
        expected = torch.log_softmax(next_token_logits(model, rollout), dim=-1)
        expected = expected[torch.arange(len(rollout.response_ids)), list(rollout.response_ids)]
        torch.testing.assert_close(torch.tensor(rollout.rollout_logprobs), expected, atol=0.1, rtol=0)


def test_a_batch_shows_its_tokens_up_to_the_last_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ProgressClock, "is_due", True)
    shown: list[str] = []
    engine = ready_engine(reference_model(tiny_config()), batch_size=4, show=shown.append)
    rollouts = engine.generate(prompts(4, 6), sampling())
    total = sum(len(rollout.response_ids) for rollout in rollouts)
    assert " of 6 responses, 4 tokens, " in shown[0]
    assert shown[-1].startswith(f"{_finished(rollouts, 4)} of 6 responses, {total:,} tokens, ")


def _finished(rollouts: list[Rollout], batch_size: int) -> int:
    """Responses of the earlier batches, and those of the last batch that ended in a stop id."""
    jobs = sorted(range(len(rollouts)), key=lambda place: len(rollouts[place].prompt_ids))
    last = jobs[len(jobs) - len(jobs) % batch_size :]
    return len(jobs) - len(last) + sum(rollouts[place].finish_reason == "stop" for place in last)
