"""The ratio follows the moving average of the loss, and survives a checkpoint."""

import json
from dataclasses import asdict

import pytest

from megatron_tip.selection import AdaptiveRatio, Selector
from tests.helpers.selection import make_batch


def states(losses: list[float], ratio: float = 0.5) -> list[AdaptiveRatio]:
    found = [AdaptiveRatio(ratio)]
    for loss in losses:
        found.append(found[-1].after(loss))
    return found


def reference(losses: list[float], ratio: float) -> list[float]:
    """AdaKD's rule in plain numbers: r (1 -+ 5 %) once the average moved by 5 %, within 0.1 and 1."""
    ratios, average, base = [ratio], losses[0], losses[0]
    for loss in losses[1:]:
        ratios.append(ratio)
        average = 0.9 * average + 0.1 * loss
        if average < 0.95 * base:
            ratio, base = max(0.1, 0.95 * ratio), average
        elif average > 1.05 * base:
            ratio, base = min(1.0, 1.05 * ratio), average
    return [*ratios, ratio]


FALLING = [1.0 * 0.9**k for k in range(60)]
RISING = [0.2 * 1.1**k for k in range(30)]


@pytest.mark.parametrize("losses", [FALLING, RISING, [*FALLING, *RISING], [1.0, 1.01, 0.99] * 5])
def test_the_ratio_is_the_published_rule(losses: list[float]):
    assert [state.ratio for state in states(losses)] == pytest.approx(reference(losses, 0.5), rel=1e-12)


def test_it_moves_between_its_bounds():
    assert states(FALLING)[-1].ratio < 0.5 < states(RISING)[-1].ratio
    assert states(FALLING * 1 + [0.0] * 200)[-1].ratio >= 0.1
    assert states([1.1**k for k in range(200)])[-1].ratio == 1.0
    assert states(FALLING, ratio=0.05)[-1].ratio == 0.05


def test_a_restored_state_continues_exactly():
    whole = states([*FALLING, *RISING])
    restored = AdaptiveRatio(**json.loads(json.dumps(asdict(whole[40]))))
    for loss, expected in zip([*FALLING, *RISING][40:], whole[41:], strict=True):
        restored = restored.after(loss)
        assert restored == expected


def test_a_ratio_that_may_fall_needs_scores_from_the_start():
    selector = Selector("ta_opd_teachability", 1.0, adaptive_ratio=True)
    assert selector.required_statistics == {"support_divergence", "compatibility"}
    statistics, index = make_batch(1, [40])
    assert selector.select(statistics, index, step=1).num_selected == 40
