import pytest
import torch.distributed as dist

from megatron_tip.errors import EngineError, PeerError, ServersLostError
from megatron_tip.parallel.together import run_on
from megatron_tip.records import Rollout
from megatron_tip.rollout.codec import decode_rollouts, encode_rollouts
from tests.helpers.distributed import run_workers

ROLLOUTS = [
    Rollout(3, 0, (1, 2, 3), (4, 5), (-0.1, -2.5), "stop", 7),
    Rollout(3, 1, (1, 2, 3), (), (), "length", 7),
    Rollout(4, 1, (9, 3), (8, 7, 6, 5, 4), (-1.0, 0.0, -1.0, 0.0, -1.0), "turns", 6, ((1, 2), (3, 4))),
    Rollout(4, 0, (9,), (8, 7, 6), (-1 / 3, 0.0, -1e-30), "length", 6, teacher="maths"),
]


def broadcast_rollouts(generate, group=None):
    """As a step sends its rollouts from the first rank of `group`."""
    source = dist.get_global_rank(group, 0) if group is not None else 0
    return run_on(source, generate, device="cpu", group=group, encode=encode_rollouts, decode=decode_rollouts)


def _send(source_group: list[int]) -> tuple[list[Rollout], list[Rollout]]:
    group = dist.new_group(source_group)

    def generate() -> list[Rollout]:
        assert dist.get_rank() == 0, "only the first rank generates"
        return ROLLOUTS

    def generate_in_group() -> list[Rollout]:
        assert dist.get_rank() == source_group[0], "only the group's first rank generates"
        return ROLLOUTS[::-1]

    in_group = broadcast_rollouts(generate_in_group, group) if dist.get_rank() in source_group else []
    return broadcast_rollouts(generate), in_group


def test_every_rank_gets_the_same_rollouts(tmp_path):
    for rank, (everywhere, in_group) in enumerate(run_workers(_send, 3, tmp_path, [1, 2])):
        assert everywhere == ROLLOUTS
        assert in_group == (ROLLOUTS[::-1] if rank else [])


def _send_nothing() -> list[list[Rollout] | None]:
    return [broadcast_rollouts(list), broadcast_rollouts(lambda: None)]


def test_no_rollouts_are_sent_too_and_not_yet_any(tmp_path):
    assert run_workers(_send_nothing, 2, tmp_path) == [[[], None]] * 2


def _fail(failure: Exception, expected: list[type[Exception]]) -> str:
    def generate() -> list[Rollout]:
        raise failure

    with pytest.raises(expected[dist.get_rank()]) as caught:
        broadcast_rollouts(generate)
    assert type(caught.value) is expected[dist.get_rank()]
    return str(caught.value)


@pytest.mark.parametrize(
    "failure, expected",
    [
        (ServersLostError("the servers' own trouble"), [ServersLostError] * 2),
        (EngineError("the engine's own trouble"), [EngineError] * 2),
        (KeyError("no class of ours"), [KeyError, PeerError]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_failure_of_the_engine_reaches_every_rank_as_what_it_is(failure, expected, tmp_path):
    messages = run_workers(_fail, 2, tmp_path, failure, expected)
    assert all(failure.args[0] in message for message in messages)
