"""The GPU's sensors, with NVML's own functions answered by a stand-in: there is no GPU where tests run."""

import types

import pynvml
import pytest

from megatron_tip.observability import gpu as module
from megatron_tip.observability.gpu import GpuReader

ANSWERS = {
    "nvmlInit": lambda: None,
    "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
    "nvmlDeviceGetMemoryInfo": lambda handle: types.SimpleNamespace(used=40 * 2**30),
    "nvmlDeviceGetUtilizationRates": lambda handle: types.SimpleNamespace(gpu=73),
    "nvmlDeviceGetPowerUsage": lambda handle: 512_500,  # milliwatts
    "nvmlDeviceGetTemperature": lambda handle, sensor: 61,
    "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: pynvml.nvmlClocksThrottleReasonSwPowerCap,
    "nvmlDeviceGetNvLinkState": lambda handle, link: int(link < 3),
    "nvmlDeviceGetNvLinkErrorCounter": lambda handle, link, counter: link,
}


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """pynvml's constants and errors with answers that tests may change."""
    stand_in = types.SimpleNamespace(**{name: getattr(pynvml, name) for name in dir(pynvml) if "vml" in name.lower()})
    assert set(ANSWERS) <= vars(stand_in).keys(), "functions that nvidia-ml-py really has"
    vars(stand_in).update(ANSWERS)
    monkeypatch.setattr(module, "pynvml", stand_in)
    return stand_in


def not_supported(*_: object) -> None:
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


def test_values_are_in_the_units_of_their_names(nvml: types.SimpleNamespace):
    reader = GpuReader.open("1234")
    assert reader is not None
    assert reader.read() == {
        "memory_used_bytes": 40 * 2**30,
        "utilisation_percent": 73.0,
        "power_watts": 512.5,
        "temperature_celsius": 61.0,
        "throttled": 1.0,
        "nvlink_errors": 3.0 * (0 + 1 + 2),  # three counters of three links
    }


def test_an_idle_gpu_is_not_throttled(nvml: types.SimpleNamespace):
    nvml.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: pynvml.nvmlClocksThrottleReasonGpuIdle
    reader = GpuReader.open("GPU-1234")
    assert reader is not None
    assert reader.read()["throttled"] == 0.0


def test_what_a_gpu_does_not_tell_is_left_out(nvml: types.SimpleNamespace):
    nvml.nvmlDeviceGetNvLinkState = not_supported
    nvml.nvmlDeviceGetPowerUsage = not_supported
    reader = GpuReader.open("1234")
    assert reader is not None
    assert reader.read().keys() == {"memory_used_bytes", "utilisation_percent", "temperature_celsius", "throttled"}


def test_without_a_driver_or_the_package_there_is_no_reader(monkeypatch: pytest.MonkeyPatch, nvml):
    nvml.nvmlInit = not_supported
    assert GpuReader.open("1234") is None
    monkeypatch.setattr(module, "pynvml", None)
    assert GpuReader.open("1234") is None
