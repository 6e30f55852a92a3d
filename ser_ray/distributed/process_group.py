"""The process group of a training, on the network that Ray uses and on no other.

Ray's own backend lets torch choose a free port, on which torch's store listens on all interfaces
and asks for no password. Here the store listens on Ray's address alone, which is the loopback for a
Ray that was started on this machine. The port is bound once, so no other process can take it.
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
"""Ray's class that starts torch's process group; it is public only through its configuration."""

_store: dist.TCPStore | None = None
"""The store that this process serves to the other workers; it ends with the process."""


def torch_config(*, gpu: bool) -> TorchConfig:
    """Ray Train's settings for workers on GPUs (NCCL) or on CPUs (gloo)."""
    return BoundConfig(backend="nccl" if gpu else "gloo")


class BoundConfig(TorchConfig):
    """The process group of workers that listen on Ray's network alone."""

    @property
    def backend_cls(self) -> type[Any]:
        """The class that starts and ends the process group."""
        return BoundBackend


class BoundBackend(TorchBackend):
    """Ray's backend, with the process group on the network of Ray."""

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
    """Serve a store to all workers on Ray's address of this node; returns host and port."""
    global _store
    host = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        port = listener.getsockname()[1]
        # The store closes the descriptor that it is given, so it gets one of its own.
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

    By default, gloo uses the address that the machine's own name resolves to. On many machines that
    is 127.0.1.1, and workers on other machines wait for it until they time out.
    """
    if interface := interface_of(ray.util.get_node_ip_address()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    store = dist.TCPStore(host, port, is_master=False, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def interface_of(address: str) -> str:
    """Name of this machine's network interface with an IPv4 address; empty if none has it."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(item.family == socket.AF_INET and item.address == address for item in addresses):
            return name
    return ""
