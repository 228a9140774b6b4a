"""What the sharded functions send, counted with its bytes, and how a fault on one rank ends all of them."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tip.errors import InputError, PeerError
from megatron_tip.vocab_parallel import divergence_loss, token_statistics
from tests.helpers import reference
from tests.helpers.distributed import run_workers
from tests.helpers.vocab_parallel import Case, called, shard, statistics


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    calls = []
    for name in ("all_reduce", "all_gather"):
        original = getattr(dist, name)

        def recorded(*args, name=name, original=original, **kwargs):
            sent = args[0] if name == "all_reduce" else args[1]
            calls.append((name, sent.numel() * sent.element_size()))
            return original(*args, **kwargs)

        monkeypatch.setattr(dist, name, recorded)
    return calls


def check_collectives() -> None:
    case, group = Case(), dist.group.WORLD
    with pytest.MonkeyPatch.context() as patch:
        calls = counted(patch)
        statistics(case, group, with_jsd=False)
        k = case.support_size
        chunks = [4, 4, 3]
        expected = [("all_gather", 40)]
        for c in chunks:
            expected += [("all_gather", 4 * c * (8 + 2 * 2 * k)), ("all_reduce", 4 * c * (2 * k + 2))]
        assert calls == expected
        calls.clear()
        statistics(replace(case, n=0), group, with_jsd=True)
        assert calls == [("all_gather", 40), ("all_gather", 0), ("all_reduce", 0), ("all_reduce", 0)], "no rows"
        calls.clear()
        statistics(case, group, with_jsd=True)
        assert len(calls) == 1 + 3 * len(chunks)
        assert calls[3::3] == [("all_reduce", 8 * c) for c in chunks]
        for name, floats, after in (("reverse_kl", 5, 0), ("forward_kl", 5, 0), ("jsd", 4, 2), ("sampled_token", 6, 0)):
            calls.clear()
            inputs = {key: shard(t, group) if "head" in key else t for key, t in case.inputs().items()}
            hidden = inputs.pop("student_hidden").requires_grad_()
            inputs |= {"student_hidden": hidden, "vocab_size": 203, "tp_group": group, "chunk_rows": 4}
            loss = called(divergence_loss, **inputs, divergence=name, labels=case.labels())
            expected = [("all_gather", 40)]
            for c in chunks:
                expected += [("all_gather", 4 * c * floats)] + [("all_reduce", 4 * c * after)] * (after > 0)
            expected.append(("all_reduce", 4 * hidden.numel()))
            assert calls == expected, name
            loss.backward()
            assert calls == expected, "the backward pass talked"


def check_that_no_group_means_no_talk() -> None:
    """`tp_group=None` is "not sharded" in a world of several ranks too: the whole vocabulary, and no collective."""
    case = Case()
    with pytest.MonkeyPatch.context() as patch:
        calls = counted(patch)
        actual = called(token_statistics, **case.inputs(), vocab_size=case.vocab_size)
        called(divergence_loss, **case.inputs(), vocab_size=case.vocab_size)
        assert calls == []
    expected = reference.kl(case.logits("student"), case.logits("teacher"))
    torch.testing.assert_close(actual.reverse_kl.double(), expected, rtol=1e-5, atol=1e-6)


def check_faults_on_one_rank() -> None:
    """What only one rank can see ends the call on every rank, with a message, and leaves none waiting."""
    group, rank = dist.group.WORLD, dist.get_rank()
    case = Case()
    inputs = case.inputs()

    def fault(name: str, value: float) -> dict[str, Tensor]:
        tensor = inputs[name] if "hidden" in name else shard(inputs[name], group)
        if rank == 1:
            tensor = tensor.clone()
            tensor[2, 3] = value
        return {name: tensor}

    bad_label = torch.full((case.n,), 203 if rank == 1 else 0)
    shorter = {key: inputs[key][: 10 if rank == 1 else 11] for key in ("student_hidden", "teacher_hidden")}
    size = 67 if rank == 1 else 68
    smaller_shard = {"vocab_size": 200, "labels": None}
    smaller_shard |= {name: shard(inputs[name], group)[:size] for name in ("student_head", "teacher_head")}
    for changes, wanted in (
        (fault("student_hidden", float("nan")), "student_hidden" if rank == 1 else "ranks [1]"),
        (fault("teacher_hidden", float("inf")), "teacher_hidden" if rank == 1 else "ranks [1]"),
        (fault("student_head", float("nan")), "head is not finite"),
        (fault("teacher_head", float("-inf")), "head is not finite"),
        ({"labels": bad_label}, "labels in [0, 203)" if rank == 1 else "ranks [1]"),
        ({**shorter, "labels": None}, "rows on all ranks of tp_group, got [11, 10, 11]"),
        (smaller_shard, "ids with padding on all ranks of tp_group, got [204, 201, 204]"),
    ):
        with pytest.raises((InputError, PeerError)) as caught:
            statistics(case, group, **changes)
        assert wanted in str(caught.value)
    heads = {**fault("student_head", float("nan")), "teacher_head": shard(inputs["teacher_head"], group)}
    with pytest.raises(InputError, match="head is not"):
        called(divergence_loss, **(inputs | heads), tp_group=group)
    # Shapes are known to all ranks: nobody waits for anybody.
    with pytest.MonkeyPatch.context() as patch:
        calls = counted(patch)
        with pytest.raises(InputError, match="vocab_size of 1 to 612"):
            statistics(replace(case, vocab_size=613), group, **{k: inputs[k] for k in ("student_head", "teacher_head")})
        assert calls == []


def check_collectives_and_faults() -> None:
    check_collectives()
    check_that_no_group_means_no_talk()
    check_faults_on_one_rank()


def test_collectives_are_counted_and_faults_end_all_ranks(tmp_path):
    run_workers(check_collectives_and_faults, 3, tmp_path, timeout_seconds=120)
