"""What is shown while a run goes on, on a terminal and elsewhere."""

import io
import logging

from rich.console import Console

from megatron_tip.observability.progress import ProgressDisplay, describe_metrics

METRICS = {
    "train/loss": 1.5,
    "train/reverse_kl": 2.25,
    "selection/retention_ratio": 0.1,
    "time/rollout_seconds": 3.0,
    "time/train_seconds": 1.0,
}
LINE = "loss 1.5000, reverse KL 2.2500, selected 10.0%, 4.0 s (rollout 3.0, train 1.0)"


def test_description_copes_with_missing_metrics():
    assert describe_metrics(METRICS) == LINE
    assert describe_metrics({"train/grad_norm": 12.0}) == "gradient norm 12"
    assert describe_metrics({}) == ""


def test_a_log_line_a_step_where_there_is_no_terminal(caplog):
    caplog.set_level(logging.INFO, logger="megatron_tip")
    console = Console(file=io.StringIO(), force_terminal=False)
    with ProgressDisplay(3, enabled=True, console=console) as progress:
        progress.show_phase("rollout")
        progress.finish_step(1, METRICS)
    assert caplog.messages == [f"step 1/3: {LINE}"]


def test_bar_phase_and_live_line_on_a_terminal(caplog):
    caplog.set_level(logging.INFO, logger="megatron_tip")
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160)
    with ProgressDisplay(3, enabled=True, console=console) as progress:
        progress.finish_step(1, METRICS)
        progress.show_phase("teacher")
    for text in ("1/3", "teacher", LINE):
        assert text in screen.getvalue()
    assert caplog.messages == []


def test_other_ranks_show_nothing(caplog):
    caplog.set_level(logging.INFO, logger="megatron_tip")
    for is_terminal in (True, False):
        screen = io.StringIO()
        console = Console(file=screen, force_terminal=is_terminal)
        with ProgressDisplay(3, enabled=False, console=console) as progress:
            progress.finish_step(1, METRICS)
        assert screen.getvalue() == ""
    assert caplog.messages == []
