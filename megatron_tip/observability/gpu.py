"""A GPU's memory, load, power, temperature, throttling and NVLink errors: the only file that imports pynvml."""

from typing import Any

try:
    import pynvml as _pynvml
except ImportError:  # nvidia-ml-py comes with the extra "monitoring"
    _pynvml = None
pynvml: Any = _pynvml

# Clocks lowered because of heat or power, not because the GPU is idle or by request.
_THROTTLE_REASONS = ("HwSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown", "SwThermalSlowdown", "SwPowerCap")
_NVLINK_ERRORS = (
    "NVML_NVLINK_ERROR_DL_REPLAY",
    "NVML_NVLINK_ERROR_DL_RECOVERY",
    "NVML_NVLINK_ERROR_DL_CRC_FLIT",
)


class GpuReader:
    """A reader of one GPU's sensors through NVML."""

    def __init__(self, handle: Any) -> None:
        """Takes NVML's `handle` of the GPU."""
        assert pynvml is not None, "made by `open`"
        self._handle = handle
        self._throttle_mask = sum(getattr(pynvml, f"nvmlClocksThrottleReason{name}", 0) for name in _THROTTLE_REASONS)

    @classmethod
    def open(cls, uuid: str) -> "GpuReader | None":
        """Returns the reader of the GPU with that UUID; None if NVML, its driver or the GPU is missing."""
        if pynvml is None:
            return None
        try:
            pynvml.nvmlInit()
            name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
            return cls(pynvml.nvmlDeviceGetHandleByUUID(name))
        except pynvml.NVMLError:
            return None

    def read(self) -> dict[str, float]:
        """Returns the current values, without those that the GPU does not report.

        `memory_used_bytes` (of all processes), `utilisation_percent` (over the driver's last sampling period),
        `power_watts`, `temperature_celsius`, `throttled` (0 or 1), `nvlink_errors` (since the driver was loaded).
        """
        readers = {
            "memory_used_bytes": lambda: pynvml.nvmlDeviceGetMemoryInfo(self._handle).used,
            "utilisation_percent": lambda: pynvml.nvmlDeviceGetUtilizationRates(self._handle).gpu,
            "power_watts": lambda: pynvml.nvmlDeviceGetPowerUsage(self._handle) / 1000,
            "temperature_celsius": lambda: pynvml.nvmlDeviceGetTemperature(self._handle, pynvml.NVML_TEMPERATURE_GPU),
            "throttled": lambda: self._throttled(),
            "nvlink_errors": lambda: self._nvlink_errors(),
        }
        values = {}
        for name, read in readers.items():
            try:
                values[name] = float(read())
            except pynvml.NVMLError:  # not every GPU has every sensor
                continue
        return values

    def _throttled(self) -> bool:
        return bool(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle) & self._throttle_mask)

    def _nvlink_errors(self) -> int:
        """Returns the errors of all links; raises NVMLError if there are no links."""
        total, num_links = 0, 0
        for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
            try:
                if not pynvml.nvmlDeviceGetNvLinkState(self._handle, link):
                    continue
                total += sum(
                    pynvml.nvmlDeviceGetNvLinkErrorCounter(self._handle, link, getattr(pynvml, name))
                    for name in _NVLINK_ERRORS
                )
                num_links += 1
            except pynvml.NVMLError:
                break  # links are counted from 0 without gaps
        if not num_links:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return total
