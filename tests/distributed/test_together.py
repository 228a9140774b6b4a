"""One rank's failure reaches all ranks, as the same class with the same message where that makes sense."""

import time

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from megatron_tip.errors import ConfigError, EngineError, MegatronTipError, NotFiniteError, OutputError, PeerError
from megatron_tip.parallel.stop import StopRequested
from megatron_tip.parallel.together import raise_together, run_on, together
from tests.helpers.distributed import run_workers

FAILURES = [OutputError("no room"), EngineError("gone"), StopRequested(15), KeyError("a bug"), NotFiniteError("NaN")]


class PrivateError(EngineError):
    """One that another rank's `errors` does not have."""


def raised(action):
    try:
        action()
    except BaseException as failure:  # StopRequested is no Exception
        return failure
    pytest.fail("nothing was raised")


def failing(failure):
    def action():
        raise failure

    return action


def fails_on_one():
    rank = dist.get_rank()
    cpu = torch.device("cpu")
    for failure in FAILURES:
        found = raised(lambda failure=failure: run_on(1, failing(failure), device=cpu))
        if rank == 1:
            assert found is failure
        elif isinstance(failure, KeyError):
            assert type(found) is PeerError
            assert "rank 1 failed with KeyError: 'a bug'" in str(found)
        else:
            assert (type(found), str(found)) == (type(failure), str(failure))
            assert isinstance(found, StopRequested) or found.met_on_rank == 1  # type: ignore[attr-defined]
    found = raised(lambda: run_on(0, failing(PrivateError("over")), device=cpu))
    assert type(found) is (PrivateError if rank == 0 else EngineError)


def returns_on_all():
    rank = dist.get_rank()
    calls = []
    value = run_on(2, lambda: calls.append(rank) or {"found": [1.5, None], "at": rank}, device="cpu")
    assert value == {"found": [1.5, None], "at": 2}
    assert calls == ([2] if rank == 2 else [])
    assert run_on(0, lambda: b"\0\1raw", device="cpu", encode=bytes, decode=bytes) == b"\0\1raw"


def raises_the_worst():
    rank = dist.get_rank()
    raise_together(None, device="cpu")
    own = {0: OutputError("first"), 1: OutputError("second"), 2: None}[rank]
    assert str(raised(lambda: raise_together(own, device="cpu"))) == "first"
    own = {0: OutputError("ours"), 1: None, 2: ZeroDivisionError("a bug")}[rank]
    found = raised(lambda: raise_together(own, device="cpu"))
    assert type(found) is (ZeroDivisionError if rank == 2 else PeerError)
    pair = dist.new_group([1, 2])
    if rank:  # ranks within a group are counted in the world
        own = ConfigError("alone") if rank == 2 else None
        found = raised(lambda: raise_together(own, device="cpu", group=pair))
        assert isinstance(found, MegatronTipError)
        assert (str(found), found.met_on_rank) == ("alone", None if rank == 2 else 2)


@pytest.mark.parametrize("work", [fails_on_one, returns_on_all, raises_the_worst])
def test_ranks_end_together(work, tmp_path):
    run_workers(work, 3, tmp_path)


class DeviceByName(TorchFunctionMode):
    """Makes tensors of the device "cuda" on the CPU, marked as `on_device`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        on_device = kwargs.get("device") == "cuda"
        if on_device:
            kwargs["device"] = "cpu"
        result = func(*args, **kwargs)
        if on_device:
            result.on_device = True
        return result


def entered_while_waiting(done):
    """The collectives that this rank enters for a slow action, as (on the device, whether the action was over)."""
    entered = []

    def noted(collective):
        def enter(tensor, *args, **arguments):
            entered.append((hasattr(tensor, "on_device"), done.exists()))
            return collective(tensor, *args, **arguments)

        return enter

    def act():
        time.sleep(0.5)
        done.touch()
        return "x" * 1000

    with pytest.MonkeyPatch.context() as patch, DeviceByName():
        for name in ("broadcast", "all_reduce"):
            patch.setattr(dist, name, noted(getattr(dist, name)))
        assert run_on(0, act, device="cuda") == "x" * 1000
        with together(device="cuda"):
            if dist.get_rank() == 0:
                time.sleep(0.2)
    return entered


def test_who_waits_for_the_first_rank_waits_on_the_cpu(tmp_path):
    _, *others = run_workers(entered_while_waiting, 3, tmp_path, tmp_path / "done")
    for entered in others:
        assert entered[0] == (False, False), "the wait itself"
        assert entered[1] == (True, True), "the bytes go over the device, after the end"
        assert entered[2] == (False, True), "the wait for a failure of any rank"
        assert all(is_over for on_device, is_over in entered if on_device)
