import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from ser_ray.distributed import node_metrics
from ser_ray.distributed.callbacks import JournalReader, JournalWriter
from ser_ray.distributed.node_metrics import NodeMetrics, gpu_handles, sample


def test_means_since_the_last_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NodeMetrics, "_run", lambda self: None)
    node = NodeMetrics()
    node._samples += [{"cpu": 10.0}, {"cpu": 30.0}]
    assert node.take() == {"cpu": 20.0}
    node._samples += [{"cpu": 50.0}]
    assert node.take() == {"cpu": 50.0}
    assert node.take() == {}


def test_a_thread_samples_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_metrics, "SAMPLE_SECONDS", 0.05)
    node = NodeMetrics()
    while not (found := node.take()):
        time.sleep(0.05)
    total = psutil.virtual_memory().total / 1e6
    assert 0 < found["system_memory_usage_megabytes"] < total
    assert 0 <= found["cpu_utilization_percentage"] <= 100


def test_gpus_are_read_as_nvidias_library_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_what_a_gpu_does_not_tell_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    library = node_metrics.pynvml

    def refuse(index: int) -> int:
        if index == 1:
            raise library.NVMLError(library.NVML_ERROR_NOT_SUPPORTED)
        return index

    monkeypatch.setattr(library, "nvmlInit", lambda: None)
    monkeypatch.setattr(library, "nvmlDeviceGetCount", lambda: 2)
    monkeypatch.setattr(library, "nvmlDeviceGetHandleByIndex", refuse)
    assert gpu_handles() == [0]
    monkeypatch.setattr(
        library, "nvmlDeviceGetMemoryInfo", lambda gpu: SimpleNamespace(used=2e9, total=8e9)
    )
    monkeypatch.setattr(library, "nvmlDeviceGetUtilizationRates", lambda gpu: refuse(1))
    values = sample([0])
    assert values["gpu_0_memory_usage_megabytes"] == 2000
    assert "gpu_0_utilization_percentage" not in values
    assert "cpu_utilization_percentage" in values


class Logged:
    """Keeps what a tracker is given."""

    def __init__(self) -> None:
        self.metrics: dict[tuple[str, int], float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int, timestamp_ms: int) -> None:
        self.metrics |= {(name, step): value for name, value in metrics.items()}

    def flush(self) -> bool:
        return True


def test_every_nodes_metrics_reach_the_tracker(tmp_path: Path) -> None:
    epoch = {
        "timestamp_ms": 1,
        "row": {"epoch": 3.0, "val_ua": 0.5},
        "learning_rates": [0.1],
        "score": 0,
    }
    reports: list[dict[str, Any]] = [
        epoch | {"node": {"10.0.0.1": {"cpu_utilization_percentage": 90.0}}},
        epoch,  # the first node's second worker
        epoch | {"node": {"10.0.0.2": {"cpu_utilization_percentage": 30.0}}},
    ]
    path = tmp_path / "epochs.jsonl"
    JournalWriter(path).after_report(None, reports, None)
    assert json.loads(path.read_text())["row"] == epoch["row"]
    tracker = Logged()
    JournalReader(path, tracker, lambda row: None)  # type: ignore[arg-type]
    assert tracker.metrics["system/10.0.0.1/cpu_utilization_percentage", 3] == 90
    assert tracker.metrics["system/10.0.0.2/cpu_utilization_percentage", 3] == 30
    assert tracker.metrics["val_ua", 3] == 0.5
