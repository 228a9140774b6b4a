"""The two rates that the tool fits to timed phases."""

import pytest

from megatron_tip.simulation.ledger import Work
from tools.check_plan_time import PHASES, fitted


def test_the_rates_that_made_the_times_are_found():
    work = {phase: Work(matrix_flops=(1 + i) * 1e9, memory_bytes=(3 - i) * 1e8) for i, phase in enumerate(PHASES)}
    seconds = {phase: 2e-11 * one.matrix_flops + 3e-10 * one.memory_bytes for phase, one in work.items()}
    device = fitted(work, seconds)
    assert (device.tflops, device.memory_tb_per_s) == pytest.approx((0.05, 1 / 300))
    assert {phase: device.seconds_of(one) for phase, one in work.items()} == pytest.approx(seconds)
    slower = {phase: 2 * found for phase, found in seconds.items()} | {"score": 0.0}  # a phase that this run lacks
    assert fitted(work, slower).tflops == pytest.approx(0.025)
