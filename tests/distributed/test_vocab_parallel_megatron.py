"""The loss behind Megatron's own tensor-parallel layers: what reaches every weight is the float64 gradient.

The last stage of a GPT in small: vocabulary-parallel embedding, a column- and a row-parallel layer with a residual, and
the head, tied to the embedding or a column-parallel layer of its own. Whole models, tied and not, at pp 1 and 2, are in
test_train_step.py.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_tip.cpu import cuda_on_cpu
from megatron_tip.models.hidden_states import masked_rows
from megatron_tip.vocab_parallel import ShardedVocabulary, divergence_loss
from tests.helpers import reference
from tests.helpers.distributed import run_workers

VOCAB_SIZE, PADDED, HIDDEN, FFN, TEACHER_HIDDEN = 37, 40, 16, 32, 24
NUM_TOKENS = 16


def make(*shape: int) -> Tensor:
    """The same values on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + shape[0])) / shape[-1] ** 0.5


def full_weights(tied: bool) -> dict[str, Tensor]:
    weights = {"embedding": make(PADDED, HIDDEN), "up": make(FFN, HIDDEN), "down": make(HIDDEN, FFN)}
    return weights if tied else weights | {"head": make(PADDED, HIDDEN) * 2}


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token ids and mask `[s]`, teacher's hidden states `[n, h]` and full head."""
    ids = torch.arange(NUM_TOKENS) * 7 % VOCAB_SIZE
    mask = ids % 3 != 0
    return ids, mask, make(int(mask.sum()), TEACHER_HIDDEN) * 5, make(PADDED, TEACHER_HIDDEN) * 5


def expected_gradients(tied: bool) -> tuple[float, dict[str, Tensor]]:
    weights = {name: weight.double().requires_grad_() for name, weight in full_weights(tied).items()}
    ids, mask, teacher_hidden, teacher_head = batch()
    embedded = weights["embedding"][ids[mask]]
    hidden = embedded + (embedded @ weights["up"].T).tanh() @ weights["down"].T
    head = weights["embedding" if tied else "head"]
    student, teacher = (
        reference.full_logits(*pair, VOCAB_SIZE) for pair in ((hidden, head), (teacher_hidden, teacher_head))
    )
    loss = reference.kl(student, teacher).sum()
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in weights.items()}


def check_layers(tied: bool, sequence_parallel: bool) -> None:
    tp_group, tp_size = parallel_state.get_tensor_model_parallel_group(), dist.get_world_size()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        ffn_hidden_size=FFN,
        tensor_model_parallel_size=tp_size,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        perform_initialization=False,
    )
    options = {"config": config, "init_method": lambda weight: weight}
    modules = {
        "embedding": VocabParallelEmbedding(PADDED, HIDDEN, reduce_scatter_embeddings=sequence_parallel, **options),
        "up": ColumnParallelLinear(HIDDEN, FFN, bias=False, gather_output=False, **options),
        "down": RowParallelLinear(FFN, HIDDEN, bias=False, input_is_parallel=True, skip_bias_add=True, **options),
    }
    if not tied:
        modules["head"] = ColumnParallelLinear(HIDDEN, PADDED, bias=False, gather_output=False, **options)

    def shard(name: str, full: Tensor) -> Tensor:
        return full.chunk(tp_size, 1 if name == "down" else 0)[dist.get_rank()]

    for name, full in full_weights(tied).items():
        modules[name].weight.data.copy_(shard(name, full))

    ids, mask, teacher_hidden, teacher_head = batch()
    embedded = modules["embedding"](ids[None])
    embedded = embedded if sequence_parallel else embedded.transpose(0, 1)
    added, _ = modules["down"](modules["up"](embedded)[0].tanh())
    rows = masked_rows(embedded + added, mask, tp_group=tp_group, sequence_parallel=sequence_parallel)
    loss = divergence_loss(
        (rows, modules["embedding" if tied else "head"].weight),
        (teacher_hidden, shard("head", teacher_head)),
        ShardedVocabulary(VOCAB_SIZE, tp_group=tp_group, chunk_rows=4),
    )
    loss.backward()
    expected_loss, expected = expected_gradients(tied)
    torch.testing.assert_close(loss.item(), expected_loss, rtol=1e-5, atol=0)
    for name, module in modules.items():
        error = (module.weight.grad.double() - shard(name, expected[name])).norm()
        assert error <= 1e-5 * expected[name].norm(), f"{name}: tied {tied}, sequence parallel {sequence_parallel}"


def check_all() -> None:
    cuda_on_cpu.install()
    parallel_state.initialize_model_parallel(dist.get_world_size())
    initialize_rng_tracker(inference_rng_tracker=True)
    for tied in (True, False):
        for sequence_parallel in (False, True):
            check_layers(tied, sequence_parallel)


def test_gradients_behind_megatron_layers_are_complete(tmp_path):
    run_workers(check_all, 4, tmp_path)
