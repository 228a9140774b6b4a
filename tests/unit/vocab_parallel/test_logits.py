import math

import pytest
import torch

from megatron_tip.vocab_parallel import (
    vocab_parallel_entropy,
    vocab_parallel_kl,
    vocab_parallel_logprobs,
    vocab_parallel_topk,
)


def test_shapes_are_those_of_the_leading_dimensions():
    logits, labels = torch.randn(2, 3, 40), torch.zeros(2, 3, dtype=torch.int64)
    assert vocab_parallel_entropy(logits).shape == (2, 3)
    assert vocab_parallel_logprobs(logits, labels).shape == (2, 3)
    assert vocab_parallel_kl(logits, logits).shape == (2, 3)
    ids, logprobs = vocab_parallel_topk(logits, 50)
    assert ids.shape == logprobs.shape == (2, 3, 40)
    assert vocab_parallel_entropy(torch.zeros(40)).item() == pytest.approx(math.log(40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_float32_and_the_logits_are_left_alone(dtype):
    logits = torch.randn(5, 40).to(dtype).requires_grad_()
    before = logits.detach().clone()
    value = vocab_parallel_entropy(logits, temperature=0.5)
    expected = torch.distributions.Categorical(logits=logits.detach().double() / 0.5).entropy()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    value.sum().backward()
    assert logits.grad.dtype == dtype
    assert torch.equal(logits, before)


def test_gradient_of_the_padding_is_zero():
    logits = torch.randn(3, 12).requires_grad_()
    vocab_parallel_entropy(logits, vocab_size=9).sum().backward()
    assert torch.equal(logits.grad[:, 9:], torch.zeros(3, 3))
    assert (logits.grad[:, :9] != 0).all()


def test_writing_into_the_logits_before_backward_is_noticed():
    logits = torch.randn(3, 12).requires_grad_()
    scaled = logits * 1.0
    value = vocab_parallel_entropy(scaled).sum()
    scaled.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
