"""Measures how much a node's CPUs, GPUs, memory and disk are used while it trains.

On each node, a thread of one worker takes samples. The worker sends the means of the samples with
its report of an epoch. MLflow's own system monitor is not used, because it writes to the tracking
store from every node, and the store may be a file on the driver's machine. The metrics have the
names and units of MLflow's monitor, so MLflow shows them on its page of system metrics.
"""

from collections.abc import Mapping
from contextlib import suppress
from statistics import fmean
from threading import Event, Thread
from typing import Any

import psutil
import pynvml

SAMPLE_SECONDS = 1.0
MEGABYTE = 1e6


class NodeMetrics:
    """Takes samples of this machine's metrics until `close` is called."""

    def __init__(self) -> None:
        self._gpus = gpu_handles()
        self._samples: list[dict[str, float]] = []
        self._closed = Event()
        psutil.cpu_percent()  # the first call only starts the measurement
        Thread(target=self._run, name="node-metrics", daemon=True).start()

    def means_since_last_call(self) -> dict[str, float]:
        """Return the mean of each metric since the last call; empty if there are no samples."""
        samples, self._samples = self._samples, []
        names = dict.fromkeys(name for each in samples for name in each)
        return {name: fmean(each[name] for each in samples if name in each) for name in names}

    def close(self) -> None:
        """Stop taking samples."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(SAMPLE_SECONDS):
            with suppress(psutil.Error, OSError):  # for example, if a disk does not answer
                self._samples.append(sample(self._gpus))


def sample(gpus: Mapping[int, Any]) -> dict[str, float]:
    """Return this machine's current metrics, and its CPU utilisation since the last call."""
    memory, disk = psutil.virtual_memory(), psutil.disk_usage("/")
    values = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / MEGABYTE,
        "system_memory_usage_percentage": memory.percent,
        "disk_available_megabytes": disk.free / MEGABYTE,
        "disk_usage_percentage": disk.percent,
    }
    for index, gpu in gpus.items():
        # A GPU may lack one of these metrics. In MIG mode, for example, it reports no utilisation.
        with suppress(pynvml.NVMLError):
            gpu_memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
            values |= {
                f"gpu_{index}_memory_usage_megabytes": gpu_memory.used / MEGABYTE,
                f"gpu_{index}_memory_usage_percentage": 100 * gpu_memory.used / gpu_memory.total,
            }
        with suppress(pynvml.NVMLError):
            utilisation = pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu
            values[f"gpu_{index}_utilization_percentage"] = utilisation
    return values


def gpu_handles() -> dict[int, Any]:
    """Return NVML's handle of every GPU by index, also of GPUs that CUDA_VISIBLE_DEVICES hides."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return {}  # there is no NVIDIA driver
    handles = {}
    for index in range(pynvml.nvmlDeviceGetCount()):
        with suppress(pynvml.NVMLError):  # a GPU that has failed has no handle
            handles[index] = pynvml.nvmlDeviceGetHandleByIndex(index)
    return handles
