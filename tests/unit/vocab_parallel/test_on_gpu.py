"""What only a GPU can run: the kernels as they are compiled, the products that add in float32."""

import pytest
import torch

from megatron_tip.vocab_parallel import divergence_loss
from megatron_tip.vocab_parallel.kernel_choice import chosen_kernels, triton_problem
from megatron_tip.vocab_parallel.products import add_head_gradient, adds_in_float32
from tests.helpers import reference
from tests.helpers.vocab_parallel import Case, called

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", ["eager", "compiled", "triton"])
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", "sampled_token"])
def test_every_set_of_kernels_matches_the_float64_formulas(name, kernels, dtype):
    case = Case(n=300, vocab_size=5003, scale=4.0, chunk_rows=128, dtype=dtype)
    inputs = {key: tensor.cuda() for key, tensor in case.inputs().items()}
    trained = [inputs[key].requires_grad_() for key in ("student_hidden", "student_head")]
    labels = case.labels().cuda()
    loss = called(
        divergence_loss, **inputs, divergence=name, labels=labels, vocab_size=5003, chunk_rows=128, kernels=kernels
    )
    loss.backward()
    full = {key: tensor.detach().double().requires_grad_() for key, tensor in inputs.items()}
    student, teacher = (case.logits(m, full[f"{m}_head"], full[f"{m}_hidden"]) for m in ("student", "teacher"))
    expected = reference.divergence(name, student, teacher, labels, 0.5).sum()
    expected.backward()
    assert abs(loss.item() - expected.item()) <= 1e-5 * abs(expected.item())
    for tensor, key in zip(trained, ("student_hidden", "student_head"), strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        assert (tensor.grad - full[key].grad).norm() <= tolerance * full[key].grad.norm()


def test_triton_runs_and_auto_chooses_it():
    device = torch.device("cuda", torch.cuda.current_device())
    assert triton_problem(device) is None
    assert chosen_kernels("auto", device) == "triton"


def test_gradients_of_heads_add_up_in_float32():
    grads, hidden = (torch.randn(3, 64, dim, device="cuda").bfloat16() for dim in (256, 128))
    total = torch.full((256, 128), torch.nan, device="cuda")
    for number in range(3):
        add_head_gradient(total, grads[number], hidden[number], first=number == 0)
    expected = torch.einsum("ncv,nch->vh", grads.double(), hidden.double())
    exact = adds_in_float32(torch.bfloat16, total.device)
    assert (total - expected).norm() <= (1e-5 if exact else 1e-2) * expected.norm()
