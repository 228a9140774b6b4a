"""A rank sends as much for the selection in any world, and real processes send and connect as simulated ones do."""

import pytest

from tools.scaling_table import check, configured, messages_of_step


def test_a_rank_sends_as_much_for_the_selection_in_any_world():
    found = {nodes: messages_of_step(*configured(nodes)) for nodes in (1, 16)}
    assert found[16].selecting == pytest.approx(found[1].selecting, rel=0.05)
    for nodes, messages in found.items():
        assert messages.cutting == 8 * 8 * 4 * nodes, "8 bytes for each sample of each prompt"


@pytest.mark.timeout(600)
def test_two_real_processes_send_and_connect_as_simulated_ones(capsys: pytest.CaptureFixture[str]):
    assert check((2,)), capsys.readouterr().out
