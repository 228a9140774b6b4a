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
        progress.finish_step(2, METRICS)
    first, second = caplog.messages
    assert first == f"step 1/3: {LINE}"
    assert second == f"step 2/3: {LINE}; elapsed 0:00:00, left 0:00:00"


def test_a_long_phase_is_logged_twice_a_minute_where_there_is_no_terminal(caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="megatron_tip")
    now = 1000.0
    monkeypatch.setattr("megatron_tip.observability.progress.time.monotonic", lambda: now)
    with ProgressDisplay(3, enabled=True, console=Console(file=io.StringIO(), force_terminal=False)) as progress:
        progress.show_phase("rollout")
        for now in (1010.0, 1029.0, 1031.0, 1040.0, 1062.0):
            progress.show_progress(f"{now:.0f} tokens")
    assert caplog.messages == ["rollout: 1031 tokens", "rollout: 1062 tokens"]


def test_bar_phase_and_live_line_on_a_terminal(caplog):
    caplog.set_level(logging.INFO, logger="megatron_tip")
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    with ProgressDisplay(3, enabled=True, console=console) as progress:
        progress.finish_step(1, METRICS)
        progress.show_phase("rollout")
        progress.show_progress("3 of 8 responses")
    for text in ("1/3", "elapsed", "left", "rollout: 3 of 8 responses", LINE):
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
