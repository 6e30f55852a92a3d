"""How the workers of a training find each other: Ray Train's own way, over the network Ray uses."""

import os
import socket
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


def torch_config(*, gpu: bool) -> TorchConfig:
    """Ray Train's settings for workers on GPUs (NCCL) or on CPUs (gloo)."""
    return TorchConfig(backend="nccl") if gpu else _GlooConfig(backend="gloo")


class _GlooConfig(TorchConfig):
    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _GlooBackend


class _GlooBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(use_network_of_ray)
        super().on_start(worker_group, backend_config)


def use_network_of_ray() -> None:
    """Let gloo listen where Ray does.

    By itself it takes the address that the machine's own name resolves to. On many that is
    127.0.1.1, and workers on other machines wait for it in vain.
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
