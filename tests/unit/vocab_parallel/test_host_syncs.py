"""How often a call waits for the device: the same few times whatever the number of chunks."""

from collections import Counter

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tip.vocab_parallel import DIVERGENCES, ShardedVocabulary, divergence_loss, token_statistics
from megatron_tip.vocab_parallel.topk_divergence import topk_divergence_loss
from megatron_tip.vocab_parallel.topk_statistics import student_statistics
from tests.helpers.vocab_parallel import Case, called

# What reads values of a tensor, or makes a tensor whose size depends on them.
_OPERATIONS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero"}
_METHODS = {"tolist", "numpy", "cpu"}


class _Operations(TorchDispatchMode):
    def __init__(self, waits: Counter):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indexes = args[1] if name in ("index", "index_put_") else []
        by_mask = any(index is not None and index.dtype == torch.bool for index in indexes)
        if name in _OPERATIONS or by_mask:
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, waits: Counter):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in _METHODS:
            self.waits[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def waits_of(function, **arguments) -> Counter:
    waits = Counter()
    with _Methods(waits), _Operations(waits):
        called(function, **arguments)
    return waits


def test_reading_a_tensor_counts():
    flags = torch.tensor([True, False])
    waits = Counter()
    with _Methods(waits), _Operations(waits):
        _ = bool(flags[0]), flags.tolist(), flags.nonzero(), flags[flags], flags.cpu(), flags.long().max().item()
    assert waits == {"_local_scalar_dense": 2, "tolist": 1, "nonzero": 1, "index": 1, "cpu": 1}


CALLS = [(token_statistics, {"with_jsd": True, "with_support": True})]
CALLS += [(divergence_loss, {"divergence": name}) for name in DIVERGENCES]


@pytest.mark.parametrize("chunk_rows", [1, 11])
@pytest.mark.parametrize("function, settings", CALLS)
def test_a_call_waits_once_for_its_arguments_and_once_for_its_result(function, settings, chunk_rows):
    case = Case()
    inputs = case.inputs() | {"labels": case.labels(), "chunk_rows": chunk_rows, **settings}
    if function is divergence_loss:
        inputs |= {name: inputs[name].requires_grad_() for name in ("student_hidden", "student_head")}
        inputs["row_weights"] = case.weights()
    assert waits_of(function, **inputs) == {"tolist": 1, "_local_scalar_dense": 1}


@pytest.mark.parametrize("chunk_rows", [1, 11])
def test_a_call_with_a_served_teacher_waits_twice(chunk_rows):
    case = Case()
    inputs, vocabulary = case.inputs(), ShardedVocabulary(case.vocab_size, chunk_rows=chunk_rows)
    student = (inputs["student_hidden"].requires_grad_(), inputs["student_head"])
    ids, labels = torch.arange(4).expand(case.n, 4).contiguous(), case.labels()
    for function, arguments in (
        (student_statistics, {"teacher_support_ids": ids}),
        (topk_divergence_loss, {"teacher_ids": ids, "teacher_id_logprobs": torch.full((case.n, 4), -3.0)}),
    ):
        waits = Counter()
        with _Methods(waits), _Operations(waits):
            function(student, vocabulary, labels=labels, **arguments)
        assert waits == {"tolist": 1, "_local_scalar_dense": 1}, function.__name__
