"""What is shown of a batch while it is generated."""

import re

from megatron_tip.rollout.progress_clock import ProgressClock


def test_parts_add_up_to_tokens_and_a_rate():
    shown: list[str] = []
    clock = ProgressClock(8, shown.append, every_seconds=0.0)
    clock.note((0, 0), 640, 0)
    clock.note((0, 0), 1000, 0)
    clock.note((1, 0), 234, 1)
    assert [text.split(" tokens, ")[0] for text in shown] == [
        "0 of 8 responses, 640",
        "0 of 8 responses, 1,000",
        "1 of 8 responses, 1,234",
    ]
    assert all(re.fullmatch(r".* tokens, [\d,]+ tokens/s", text) for text in shown)


def test_what_is_not_due_is_counted_and_not_shown():
    shown: list[str] = []
    clock = ProgressClock(8, shown.append, every_seconds=1000.0)
    clock.note("a", 5, 0)
    assert (shown, clock.is_due) == ([], False)
