"""The time of generation, from the engines' memory and links."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_tip.config.io import load_config
from megatron_tip.machine import Machine
from megatron_tip.planning.plan import outline_run
from megatron_tip.simulation.assumptions import assumed_rollouts
from megatron_tip.simulation.device import find_device
from megatron_tip.simulation.plan import planned_hosts
from megatron_tip.simulation.timing import Generation, generation_of

RECIPE = Path(__file__).parents[3] / "examples" / "qwen3_14b_to_4b" / "qwen3_14b_to_4b.toml"


def generation(split: int, link_latency_us: float) -> Generation:
    config = load_config(RECIPE, [f"sglang.tensor_parallel_size={split}"])
    hosts = planned_hosts(config, 8, 8)
    outline = outline_run(config, 64, Machine(is_elsewhere=True), hosts)
    device = replace(find_device("h800"), link_latency_us=link_latency_us)
    return generation_of(config, outline, device, assumed_rollouts(config, longest=True))


def test_a_server_over_several_gpus_reads_faster_and_pays_the_latency_of_its_sums():
    one, two = generation(1, 0.0), generation(2, 0.0)
    assert (one.num_servers, two.num_servers) == (64, 32)
    assert two.seconds < one.seconds
    assert generation(1, 10.0).seconds == one.seconds, "one GPU sends nothing"
    sums = 2 * 36 * 8192  # twice per layer and position of the longest response
    assert generation(2, 10.0).seconds - two.seconds == pytest.approx(two.num_waves * sums * 10e-6)
