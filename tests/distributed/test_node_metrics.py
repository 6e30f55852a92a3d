import time
from types import SimpleNamespace

import psutil
import pytest

from ser_ray.distributed import node_metrics
from ser_ray.distributed.node_metrics import NodeMetrics, gpu_handles, sample


def test_means_cover_the_samples_since_the_last_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(NodeMetrics, "_run", lambda self: None)
    node = NodeMetrics()
    node._samples += [{"cpu": 10.0}, {"cpu": 30.0}]
    assert node.means_since_last_call() == {"cpu": 20.0}
    node._samples += [{"cpu": 50.0}]
    assert node.means_since_last_call() == {"cpu": 50.0}
    assert node.means_since_last_call() == {}


def test_a_thread_samples_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_metrics, "SAMPLE_SECONDS", 0.05)
    node = NodeMetrics()
    while not (found := node.means_since_last_call()):
        time.sleep(0.05)
    total = psutil.virtual_memory().total / 1e6
    assert 0 < found["system_memory_usage_megabytes"] < total
    assert 0 <= found["cpu_utilization_percentage"] <= 100


def test_gpus_are_numbered_as_in_nvidias_library(monkeypatch: pytest.MonkeyPatch) -> None:
    library = node_metrics.pynvml
    monkeypatch.setattr(library, "nvmlInit", lambda: None)
    monkeypatch.setattr(library, "nvmlDeviceGetCount", lambda: 2)
    monkeypatch.setattr(library, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(
        library, "nvmlDeviceGetMemoryInfo", lambda gpu: SimpleNamespace(used=2e9, total=8e9)
    )
    monkeypatch.setattr(
        library, "nvmlDeviceGetUtilizationRates", lambda gpu: SimpleNamespace(gpu=40 + gpu)
    )
    values = sample(gpu_handles())
    assert values["gpu_0_utilization_percentage"] == 40
    assert values["gpu_1_utilization_percentage"] == 41
    assert values["gpu_1_memory_usage_percentage"] == 25
    assert values["gpu_1_memory_usage_megabytes"] == 2000


def test_metrics_that_a_gpu_does_not_report_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    library = node_metrics.pynvml

    def refuse(index: int) -> int:
        if index == 0:
            raise library.NVMLError(library.NVML_ERROR_NOT_SUPPORTED)
        return index

    monkeypatch.setattr(library, "nvmlInit", lambda: None)
    monkeypatch.setattr(library, "nvmlDeviceGetCount", lambda: 2)
    monkeypatch.setattr(library, "nvmlDeviceGetHandleByIndex", refuse)
    assert gpu_handles() == {1: 1}
    monkeypatch.setattr(
        library, "nvmlDeviceGetMemoryInfo", lambda gpu: SimpleNamespace(used=2e9, total=8e9)
    )
    monkeypatch.setattr(library, "nvmlDeviceGetUtilizationRates", lambda gpu: refuse(0))
    values = sample(gpu_handles())
    assert values["gpu_1_memory_usage_megabytes"] == 2000
    assert "gpu_1_utilization_percentage" not in values
    assert "cpu_utilization_percentage" in values
