"""Connects the workers of a training by a torch process group that uses Ray's network only.

The workers meet at a TCPStore of torch, which has no password. With Ray's own backend, this store
listens on all network interfaces. Here, it listens only on Ray's address of the node, which is the
loopback address if ser_ray itself started Ray. The store gets a socket that is already bound to its
port, so no other process can take the port first.
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
"""Ray's class that starts torch's process group. Only TorchConfig gives access to it."""

_store: dist.TCPStore | None = None
"""The store that this process serves, if any. This reference keeps the store alive."""


class BoundConfig(TorchConfig):
    """Settings that make Ray Train use `BoundBackend`."""

    @property
    def backend_cls(self) -> type[Any]:
        """The class that starts and ends the process group."""
        return BoundBackend


class BoundBackend(TorchBackend):
    """Ray's torch backend, changed so that the process group uses Ray's network only."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Serve a store from worker 0, and make all workers join the process group."""
        host, port = worker_group.execute_single(0, serve_store)
        world_size = len(worker_group)
        timeout = timedelta(seconds=backend_config.timeout_s)
        joined = [
            worker_group.execute_single_async(
                rank, join_group, backend_config.backend, host, port, rank, world_size, timeout
            )
            for rank in range(world_size)
        ]
        ray.get(joined)


def serve_store() -> tuple[str, int]:
    """Start a store that listens on Ray's address of this node; return its host and port."""
    global _store
    host = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        port = listener.getsockname()[1]
        # The store gets a copy of the descriptor, because it and `listener` both close theirs.
        _store = dist.TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=os.dup(listener.fileno()),
        )
    return host, port


def join_group(
    backend: str, host: str, port: int, rank: int, world_size: int, timeout: timedelta
) -> None:
    """Join the process group of the workers, through the network interface that Ray uses.

    By default, gloo uses the address of the machine's host name. On many machines, this is
    127.0.1.1, which workers on other machines cannot reach.
    """
    if interface := interface_of(ray.util.get_node_ip_address()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    store = dist.TCPStore(host, port, is_master=False, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def interface_of(address: str) -> str:
    """Return the name of the network interface with this IPv4 address; empty if none has it."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(item.family == socket.AF_INET and item.address == address for item in addresses):
            return name
    return ""
