"""Starts the process group of a training on Ray's network only.

With Ray's own backend, torch's store listens on all network interfaces without a password. Here,
the store listens only on Ray's address, which is the loopback address if Ray was started on this
machine. The port is bound once and stays bound, so no other process can use it in between.
"""

import os
import socket
from datetime import timedelta
from typing import Any

import psutil
import ray
import torch.distributed as dist
from ray.train.torch import TorchConfig

TorchBackend: Any = TorchConfig().backend_cls
"""Ray's class that starts torch's process group. Only TorchConfig makes the class public."""

_store: dist.TCPStore | None = None
"""The store that this process serves to the other workers until the process ends."""


class BoundConfig(TorchConfig):
    """Ray Train's settings for workers that listen only on Ray's network."""

    @property
    def backend_cls(self) -> type[Any]:
        """The class that starts and ends the process group."""
        return BoundBackend


class BoundBackend(TorchBackend):
    """Ray's backend with a process group on Ray's network only."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Start the process group."""
        host, port = worker_group.execute_single(0, serve_store)
        size = len(worker_group)
        timeout = timedelta(seconds=backend_config.timeout_s)
        joined = [
            worker_group.execute_single_async(
                rank, join_group, backend_config.backend, host, port, rank, size, timeout
            )
            for rank in range(size)
        ]
        ray.get(joined)


def serve_store() -> tuple[str, int]:
    """Serve a store to all workers on Ray's address of this node; return host and port."""
    global _store
    host = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        port = listener.getsockname()[1]
        # Both the store and `listener` close their descriptors, so each needs its own.
        _store = dist.TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=os.dup(listener.fileno()),
        )
    return host, port


def join_group(
    backend: str, host: str, port: int, rank: int, size: int, timeout: timedelta
) -> None:
    """Join the process group of the workers.

    By default, gloo uses the address of the machine's host name. On many machines, this is
    127.0.1.1, which workers on other machines cannot reach.
    """
    if interface := interface_of(ray.util.get_node_ip_address()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    store = dist.TCPStore(host, port, is_master=False, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def interface_of(address: str) -> str:
    """Name of the network interface that has this IPv4 address; empty if there is none."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(item.family == socket.AF_INET and item.address == address for item in addresses):
            return name
    return ""
