"""The process group of the workers listens where Ray does."""

import multiprocessing
from datetime import timedelta

import psutil
import pytest
import ray
import torch
import torch.distributed as dist

from ser_ray.distributed import process_group
from ser_ray.distributed.process_group import BoundBackend, BoundConfig, interface_of


def test_an_interface_is_found_by_its_address():
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.9") == ""


def test_all_workers_use_a_process_group_on_rays_network():
    assert BoundConfig(backend="gloo").backend_cls is BoundBackend


def work(rank: int, address: tuple[str, int], sums) -> None:
    ray.util.get_node_ip_address = lambda: "127.0.0.1"
    process_group.join_group("gloo", *address, rank, 2, timedelta(seconds=60))
    value = torch.tensor(float(rank + 1))
    dist.all_reduce(value)
    listening = [
        item.laddr.ip
        for item in psutil.Process().net_connections("inet")
        if item.status == psutil.CONN_LISTEN
    ]
    sums.put((float(value), listening))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_workers_join_through_a_store_that_listens_on_one_address(monkeypatch):
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(process_group, "_store", None)
    host, port = process_group.serve_store()
    here = [
        (item.laddr.ip, item.laddr.port)
        for item in psutil.Process().net_connections("inet")
        if item.status == psutil.CONN_LISTEN
    ]
    assert (host, port) == ("127.0.0.1", port)
    assert (host, port) in here
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    workers = [spawn.Process(target=work, args=(rank, (host, port), answers)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert [total for total, _ in found] == [3.0, 3.0]
    assert {address for _, listening in found for address in listening} == {"127.0.0.1"}
    assert {address for address, number in here if number == port} == {"127.0.0.1"}
