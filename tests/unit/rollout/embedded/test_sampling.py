import torch

from megatron_tip.rollout.embedded.sampling import TokenSampler, keep_nucleus, sample_by_inverse_cdf


def test_frequencies_are_the_probabilities():
    probabilities = torch.tensor([0.05, 0.0, 0.5, 0.15, 0.3])
    uniforms = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    tokens = sample_by_inverse_cdf(probabilities.log().expand(10_000, 5), uniforms)
    frequencies = tokens.flatten().bincount(minlength=5) / 10_000
    torch.testing.assert_close(frequencies, probabilities, atol=2e-4, rtol=0)


def test_a_token_without_probability_is_never_drawn():
    logprobs = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(2, 3)
    uniforms = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sample_by_inverse_cdf(logprobs, uniforms).flatten().tolist() == [1, 1]


def test_the_nucleus_is_the_smallest_set_that_holds_top_p():
    logprobs = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]]).log()
    kept = keep_nucleus(logprobs, 0.6).exp()
    torch.testing.assert_close(kept, torch.tensor([[0.0, 4 / 7, 0.0, 3 / 7], [1 / 3, 1 / 3, 1 / 3, 0.0]]))
    torch.testing.assert_close(keep_nucleus(logprobs, 0.05).exp()[0], torch.tensor([0.0, 1.0, 0.0, 0.0]))


def test_recorded_logprobs_are_those_after_temperature_and_top_p():
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)) * 3
    sampler = TokenSampler([1, 2, 3], 2, temperature=0.5, top_p=0.8, device=torch.device("cpu"))
    tokens = torch.stack([sampler(torch.empty(0), logits).argmax(-1) for _ in range(2)], dim=1)
    expected = keep_nucleus(torch.log_softmax(logits / 0.5, -1), 0.8).gather(1, tokens)
    assert torch.equal(sampler.sampled_logprobs(), expected)
    assert expected.isfinite().all()
