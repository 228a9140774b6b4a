"""A device is known by name or described by a file, and its times follow from its peaks."""

from pathlib import Path

import pytest

from megatron_tip.errors import ConfigError
from megatron_tip.simulation.device import Device, find_device
from megatron_tip.simulation.ledger import Route, Traffic, Work
from megatron_tip.training.throughput import PEAK_TFLOPS

SIMPLE = Device(
    name="simple",
    tflops=1.0,
    memory_gib=1.0,
    memory_tb_per_s=1.0,
    link_gb_per_s=10.0,
    network_gb_per_s=1.0,
    source="made up",
    link_latency_us=1.0,
    network_latency_us=1.0,
    launch_us=1.0,
    matrix_share=0.5,
    memory_share=0.5,
    link_share=0.5,
)


def test_time_of_arithmetic_is_that_of_products_and_memory_but_not_below_that_of_starting_operations():
    assert SIMPLE.seconds_of(Work(matrix_flops=10**12, memory_bytes=10**12)) == pytest.approx(2 + 2)
    starting = Work(matrix_flops=10**12, num_operations=10**7)
    assert SIMPLE.seconds_of(starting) == pytest.approx(10.0)


def test_messages_within_a_node_take_its_links_and_others_the_network():
    traffic = Traffic(num_messages=1, num_bytes=5 * 10**9)
    within = Route("train", "all_gather", "tp", (0, 1))
    between = Route("train", "all_gather", "tp", (7, 8))
    assert SIMPLE.seconds_of_traffic(within, traffic, workers_per_node=8) == pytest.approx(0.5, rel=1e-5)
    assert SIMPLE.seconds_of_traffic(between, traffic, workers_per_node=8) == pytest.approx(5.0, rel=1e-5)
    reduce = Route("train", "all_reduce", "dp", (0, 1, 2, 3))
    assert SIMPLE.seconds_of_traffic(reduce, traffic, workers_per_node=8) == pytest.approx(1.5, rel=1e-5)
    alone = Route("train", "all_reduce", "dp", (3,))
    assert SIMPLE.seconds_of_traffic(alone, traffic, workers_per_node=8) == 0


def test_an_unknown_device_is_refused_with_the_known_ones_and_how_to_describe_another():
    with pytest.raises(ConfigError, match=r"h800, h100, h200, a100, b200, or a TOML file.*'h80'; the nearest"):
        find_device("h80")


def test_peaks_are_those_of_the_utilisation_that_a_run_logs():
    for name in ("h800", "h100", "h200", "a100", "b200"):
        assert find_device(name).tflops == PEAK_TFLOPS[name.upper()]


def test_every_known_device_names_its_source():
    for name in ("h800", "h100", "h200", "a100", "b200"):
        assert len(find_device(name).source) > 20


@pytest.mark.parametrize(
    "text,expected",
    [
        ("[x]\ntflops = 1.0\n", "expected a value for link_gb_per_s of x"),
        ("[x]\nspeed = 1.0\n", "got speed"),
        ("[x\n", "expected a TOML file"),
        ("[x]\ntflops = 0\n", "expected a value for"),
        ("[x]\n[y]\n", "expected one table"),
        ("x = 1\n", "got the key x outside of any"),
    ],
)
def test_a_damaged_description_is_refused(text: str, expected: str, tmp_path: Path):
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(ConfigError, match=expected):
        find_device(str(tmp_path / "x.toml"))
