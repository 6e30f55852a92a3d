"""The process group of a training: Ray Train sets it up, on the network that Ray uses."""

import os
import socket
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig

TorchBackend: Any = TorchConfig().backend_cls
"""Ray's class that starts torch's process group; it is public only through its configuration."""


def torch_config(*, gpu: bool) -> TorchConfig:
    """Ray Train's settings for workers on GPUs (NCCL) or on CPUs (gloo)."""
    return TorchConfig(backend="nccl") if gpu else GlooConfig(backend="gloo")


class GlooConfig(TorchConfig):
    """The process group of CPU workers."""

    @property
    def backend_cls(self) -> type[Any]:
        """The class that starts and ends the process group."""
        return GlooBackend


class GlooBackend(TorchBackend):
    """Ray's backend, with gloo on the network of Ray."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Start the process group."""
        worker_group.execute(use_network_of_ray)
        super().on_start(worker_group, backend_config)


def use_network_of_ray() -> None:
    """Let gloo listen where Ray does.

    By default it uses the address that the machine's own name resolves to. On many machines that
    is 127.0.1.1, and workers on other machines wait for it until they time out.
    """
    interface = interface_of(ray.util.get_node_ip_address())
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def interface_of(address: str) -> str:
    """Name of this machine's network interface with an IPv4 address; empty if none has it."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(item.family == socket.AF_INET and item.address == address for item in addresses):
            return name
    return ""
