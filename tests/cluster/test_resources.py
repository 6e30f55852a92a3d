"""The resources of this machine if Ray is not used."""

import os

import pytest
import ray

from ser_ray.cluster import resources
from ser_ray.cluster.resources import (
    available_memory,
    cpus_per_worker,
    max_nodes,
    openmp_threads,
    require_workers,
    trains_on_gpus,
)
from ser_ray.errors import ResourcesError


def test_without_ray_the_nodes_are_this_machine_within_its_containers_limits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = {"cpu.max": "150000 100000", "memory.max": "1000"}
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    monkeypatch.setattr(resources, "_container_limit", lambda name: limits.get(name, ""))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert max_nodes() == [{"CPU": 1, "GPU": 3}]
    assert trains_on_gpus("auto")
    assert not trains_on_gpus("cpu")
    assert cpus_per_worker(1) == 1
    assert available_memory() == 1000
    limits.clear()
    assert cpus_per_worker(1) == 4
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert not trains_on_gpus("auto")
    with pytest.raises(ResourcesError, match=r"this machine has 0: .* --device cpu"):
        require_workers(1, cpus=1, gpus=1)


@pytest.mark.parametrize(("value", "number"), [("", 0), ("3", 3), ("4,2", 4), (" 2 ", 2), ("x", 0)])
def test_the_number_of_threads_may_be_a_list(monkeypatch, value, number):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert openmp_threads() == number
