import copy

import pytest
import torch
from torch import Tensor

from megatron_tip.vocab_parallel import DIVERGENCES, divergence_loss, kernels
from tests.helpers import reference
from tests.helpers.vocab_parallel import called


def models(n=6, vocab_size=50, seed=0, dtype=torch.float32, scale=1.0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    made = {
        "student_hidden": torch.randn(n, 8, generator=g),
        "student_head": torch.randn(vocab_size, 8, generator=g) * scale,
        "teacher_hidden": torch.randn(n, 12, generator=g),
        "teacher_head": torch.randn(vocab_size, 12, generator=g) * scale,
    }
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def with_gradients(inputs: dict[str, Tensor], **arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients with respect to hidden states and head."""
    inputs = copy.copy(inputs)
    for name in ("student_hidden", "student_head"):
        inputs[name] = inputs[name].clone().requires_grad_()
    loss = called(divergence_loss, **inputs, **arguments)
    loss.backward()
    return loss.detach(), inputs["student_hidden"].grad, inputs["student_head"].grad


def test_sampled_token_gradient_has_the_reverse_kl_gradient_as_its_mean():
    """Summed over every token y with weight p(y), the estimator's gradient is that of KL(p || q) exactly."""
    n, vocab_size = 4, 20
    inputs = models(n, vocab_size)
    p = reference.full_logits(inputs["student_hidden"], inputs["student_head"]).softmax(-1)
    every = {name: t.repeat_interleave(vocab_size, 0) if "hidden" in name else t for name, t in inputs.items()}
    labels = torch.arange(vocab_size).repeat(n)
    weights = p.flatten().float()
    arguments = {"divergence": "sampled_token", "labels": labels, "row_weights": weights}
    value, grad_hidden, grad_head = with_gradients(every, **arguments)
    expected, expected_hidden, expected_head = with_gradients(inputs)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad_hidden.view(n, vocab_size, -1).sum(1), expected_hidden)
    torch.testing.assert_close(grad_head, expected_head)


@pytest.mark.parametrize("beta, end", [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_the_jsd_at_its_ends_is_a_kl_and_is_what_it_tends_to(beta, end):
    inputs = models(scale=0.3)
    at_end = with_gradients(inputs, divergence="jsd", jsd_beta=beta)
    for actual, expected in zip(at_end, with_gradients(inputs, divergence=end), strict=True):
        assert torch.equal(actual, expected)
    assert at_end[0] > 0.1
    near = 1e-4 if beta == 0 else 1 - 1e-4
    close = with_gradients(inputs, divergence="jsd", jsd_beta=near)
    for actual, expected in zip(close, at_end, strict=True):
        assert (actual / (near * (1 - near)) - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_add_up_by_weight_and_rows_of_weight_zero_do_not_count(divergence):
    inputs, labels = models(), torch.arange(6)
    weights = torch.tensor([0.0, 2, 0.5, 0, 1, 3])
    loss, grad_hidden, grad_head = with_gradients(inputs, divergence=divergence, labels=labels, row_weights=weights)
    kept = weights > 0
    few = {name: tensor[kept] if "hidden" in name else tensor for name, tensor in inputs.items()}
    expected = with_gradients(few, divergence=divergence, labels=labels[kept], row_weights=weights[kept])
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(grad_hidden[kept], expected[1])
    assert torch.equal(grad_hidden[~kept], torch.zeros_like(grad_hidden[~kept]))
    torch.testing.assert_close(grad_head, expected[2])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_rows_give_an_exact_zero_with_zero_gradients(divergence):
    labels = torch.empty(0, dtype=torch.int64)
    loss, grad_hidden, grad_head = with_gradients(models(0), divergence=divergence, labels=labels)
    assert loss.item() == 0
    assert grad_hidden.shape == (0, 8)
    assert torch.equal(grad_head, torch.zeros(50, 8))


def test_gradients_are_made_only_where_they_are_wanted(monkeypatch):
    made = []
    monkeypatch.setattr(kernels, "reverse_kl_gradient", lambda *args: made.append(args) or ())
    inputs = models()
    assert not called(divergence_loss, **inputs).requires_grad
    inputs["student_head"].requires_grad_()
    with torch.no_grad():
        assert not called(divergence_loss, **inputs).requires_grad
    assert made == []
    called(divergence_loss, **inputs).backward()
    assert made


@pytest.mark.parametrize("frozen", ["student_hidden", "student_head"])
def test_a_frozen_input_gets_no_gradient_and_the_other_its_own(frozen):
    inputs = models()
    trained = "student_head" if frozen == "student_hidden" else "student_hidden"
    inputs[trained] = inputs[trained].requires_grad_()
    called(divergence_loss, **inputs).backward()
    _, grad_hidden, grad_head = with_gradients({name: tensor.detach() for name, tensor in inputs.items()})
    torch.testing.assert_close(inputs[trained].grad, grad_head if frozen == "student_hidden" else grad_hidden)
    assert inputs[frozen].grad is None


def test_the_teacher_gets_no_gradient():
    inputs = {name: tensor.requires_grad_() for name, tensor in models().items()}
    called(divergence_loss, **inputs).backward()
    assert inputs["teacher_hidden"].grad is None
    assert inputs["teacher_head"].grad is None


def test_padding_rows_of_the_head_get_a_zero_gradient():
    inputs = models(vocab_size=50)
    _, grad_hidden, grad_head = with_gradients(inputs, vocab_size=41)
    real = {name: tensor[:41] if "head" in name else tensor for name, tensor in inputs.items()}
    _, expected_hidden, expected_head = with_gradients(real)
    assert torch.equal(grad_hidden, expected_hidden)
    assert torch.equal(grad_head[:41], expected_head)
    assert torch.equal(grad_head[41:], torch.zeros(9, 8))


@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
def test_the_chunk_changes_nothing(chunk_rows):
    for actual, expected in zip(with_gradients(models(), chunk_rows=chunk_rows), with_gradients(models()), strict=True):
        torch.testing.assert_close(actual, expected)


def test_gradients_add_up_over_calls_and_scale_with_the_upstream_gradient():
    inputs = models()
    head = inputs["student_head"].clone().requires_grad_()
    for _ in range(2):
        (2.5 * called(divergence_loss, **(inputs | {"student_head": head}))).backward()
    _, _, expected = with_gradients(inputs)
    torch.testing.assert_close(head.grad, 5 * expected)


def test_a_second_backward_is_refused_instead_of_wrong():
    inputs = models()
    inputs["student_head"].requires_grad_()
    loss = called(divergence_loss, **inputs)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran a second time"):
        loss.backward()


def test_backward_hands_the_gradient_over_without_a_copy():
    inputs = models()
    inputs["student_head"].requires_grad_()
    loss = called(divergence_loss, **inputs)
    pointer = loss.grad_fn.grads[1].data_ptr()
    loss.backward()
    assert inputs["student_head"].grad.data_ptr() == pointer


def test_nothing_of_rows_by_vocabulary_is_kept(monkeypatch):
    """Between forward and backward the loss holds the two gradients and no other tensor."""
    inputs = models(64, 500)
    for name in ("student_hidden", "student_head"):
        inputs[name].requires_grad_()
    loss = called(divergence_loss, **inputs, chunk_rows=8)
    kept = [t for t in [*loss.grad_fn.grads, *loss.grad_fn.saved_tensors] if t is not None]
    assert sorted(t.numel() for t in kept) == sorted([64 * 8, 500 * 8])


def test_bfloat16_is_no_worse_than_plain_autograd():
    inputs = models(64, 2000, dtype=torch.bfloat16, scale=0.5)
    exact = {name: tensor.double() for name, tensor in inputs.items()}
    plain = {name: tensor.clone() for name, tensor in inputs.items()}
    for tensors in (exact, plain):
        for name in ("student_hidden", "student_head"):
            tensors[name].requires_grad_()
        p, q = (tensors[f"{m}_hidden"] @ tensors[f"{m}_head"].T for m in ("student", "teacher"))
        if tensors is plain:
            p, q = p.float(), q.float()
        reference.kl(p, q).sum().backward()
    ours = dict(zip(("student_hidden", "student_head"), with_gradients(inputs, chunk_rows=16)[1:], strict=True))
    for name, grad in ours.items():
        wanted = exact[name].grad
        error, plain_error = ((g.double() - wanted).norm() / wanted.norm() for g in (grad, plain[name].grad))
        assert error <= 2e-2
        assert error <= 1.05 * plain_error, name
