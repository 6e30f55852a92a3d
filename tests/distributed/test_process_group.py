from ray.train.torch import TorchConfig

from ser_ray.distributed.process_group import GlooBackend, interface_of, torch_config


def test_an_interface_is_found_by_its_address():
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.9") == ""


def test_cpu_workers_use_rays_own_process_group_on_its_network():
    assert torch_config(gpu=False).backend_cls is GlooBackend
    assert issubclass(GlooBackend, TorchConfig().backend_cls)
    assert torch_config(gpu=True).backend_cls is TorchConfig().backend_cls
