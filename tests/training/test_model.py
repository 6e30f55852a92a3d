"""The network against torchvision's, and the weights files that it can start from."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import ResNet18_Weights, resnet18

from ser_ray.errors import CheckpointError
from ser_ray.training.model import IMAGENET_URL, ResNet18, fold_batch_norm, read_pretrained


@pytest.fixture
def rgb_network() -> torch.nn.Module:
    torch.manual_seed(3)
    return resnet18(num_classes=1000).eval()


def one_channel_torchvision(num_labels: int) -> nn.Module:
    """torchvision's ResNet18 with its first layer replaced by a one-channel convolution."""
    network = resnet18(num_classes=num_labels)
    network.conv1 = nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    return network


def test_a_seed_gives_the_weights_and_names_of_torchvision():
    torch.manual_seed(7)
    own = ResNet18(5)
    torch.manual_seed(7)
    expected = one_channel_torchvision(5).state_dict()
    assert list(own.state_dict()) == list(expected)
    for name, value in own.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_outputs_and_gradients_are_those_of_torchvision(layout):
    own, expected = ResNet18(5), one_channel_torchvision(5)
    expected.load_state_dict(own.state_dict())
    batch = torch.randn(3, 1, 48, 70)
    for network in (own, expected):
        network.to(memory_format=layout)  # type: ignore[call-overload]
        network(batch.contiguous(memory_format=layout)).square().sum().backward()
    for one, other in zip(own.parameters(), expected.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)
    for name, buffer in own.named_buffers():
        assert torch.equal(buffer, expected.get_buffer(name))
    with torch.no_grad():
        assert torch.equal(own.eval()(batch), expected.eval()(batch))


def test_folding_batch_norm_does_not_change_the_outputs():
    torch.manual_seed(1)
    network = ResNet18(5)
    for _ in range(3):  # so that the statistics differ from the initial ones
        network(torch.randn(8, 1, 64, 64) * 3 + 1)
    batch = torch.randn(3, 1, 64, 64)
    with torch.no_grad():
        expected = network.eval()(batch)
        folded = fold_batch_norm(network)
        torch.testing.assert_close(folded(batch), expected, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


def test_the_url_of_the_imagenet_weights_is_torchvisions():
    assert ResNet18_Weights.IMAGENET1K_V1.url == IMAGENET_URL


def test_one_channel_gives_the_outputs_of_three_equal_rgb_channels(rgb_network, tmp_path):
    torch.save(rgb_network.state_dict(), tmp_path / "rgb.pth")
    pretrained = read_pretrained(str(tmp_path / "rgb.pth"), num_labels=8)
    network = ResNet18(8).eval()
    network.load_state_dict(network.state_dict() | pretrained.state)
    image = torch.randn(2, 1, 64, 50)
    # The last layers differ in size, so their inputs are compared.
    for either in (network, rgb_network):
        setattr(either, "fc", nn.Identity())  # noqa: B010 - the type of `fc` is narrower
    with torch.no_grad():
        torch.testing.assert_close(
            network(image), rgb_network(image.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5
        )
    assert "fresh: fc" in pretrained.origin


@pytest.mark.parametrize(
    "layout",
    ["plain", "state_dict", "module.", "_orig_mod.module.", "network.model.", "safetensors"],
)
def test_common_layouts_of_weights_files_are_read(rgb_network, tmp_path, layout):
    state = rgb_network.state_dict()
    path = tmp_path / ("w.safetensors" if layout == "safetensors" else "w.pth")
    if layout == "safetensors":
        save_file(state, path)
    elif layout.endswith("."):
        torch.save({"model": {f"{layout}{key}": value for key, value in state.items()}}, path)
    else:
        torch.save(state if layout == "plain" else {"state_dict": state, "epoch": 3}, path)
    pretrained = read_pretrained(str(path), num_labels=8)
    assert torch.equal(pretrained.state["layer3.0.conv1.weight"], state["layer3.0.conv1.weight"])
    assert torch.equal(pretrained.state["conv1.weight"], state["conv1.weight"].sum(1, keepdim=True))


def test_layers_missing_from_the_file_are_named_as_fresh(rgb_network, tmp_path):
    state = {
        k: v for k, v in rgb_network.state_dict().items() if not k.startswith(("layer4", "fc"))
    }
    torch.save(state, tmp_path / "w.pth")
    assert read_pretrained(str(tmp_path / "w.pth"), 8).origin.endswith("; fresh: fc, layer4")


def test_missing_batch_norm_counters_are_not_named_as_fresh(rgb_network, tmp_path):
    state = rgb_network.state_dict()
    torch.save({k: v for k, v in state.items() if "tracked" not in k}, tmp_path / "w.pth")
    assert read_pretrained(str(tmp_path / "w.pth"), 1000).origin == "weights of w.pth"


def _wrong_shape(path: Path) -> None:
    torch.save({"layer1.0.conv1.weight": torch.zeros(2, 2)}, path)


def _foreign(path: Path) -> None:
    torch.save({"encoder.weight": torch.zeros(2)}, path)


def _text(path: Path) -> None:
    path.write_text("not weights")


def _empty(path: Path) -> None:
    path.touch()


def _truncated(path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(64, 1, 7, 7)}, path)
    path.write_bytes(path.read_bytes()[:1000])


def _pickled_network(path: Path) -> None:
    torch.save(nn.Linear(1, 1), path)


def _absent(path: Path) -> None:
    path.unlink(missing_ok=True)


@pytest.mark.parametrize("content", [b"", b"not weights", b"\x05" + bytes(7) + b"{abc}"])
def test_a_damaged_safetensors_file_is_refused(tmp_path, content):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a readable weights file"):
        read_pretrained(str(tmp_path / "w.safetensors"), 8)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_wrong_shape, r"layer1.0.conv1.weight is \[2, 2\], a ResNet18 has \[64, 64, 3, 3\]"),
        (_foreign, "holds no layer of a ResNet18"),
        (_text, "not a readable weights file"),
        (_empty, "not a readable weights file"),
        (_truncated, "not a readable weights file"),
        (_pickled_network, "not a readable weights file"),
        (_absent, "no such file; --weights takes imagenet, none, a file or a model"),
    ],
)
def test_the_error_of_unusable_weights_names_the_reason(tmp_path, spoil, message):
    spoil(tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=message):
        read_pretrained(str(tmp_path / "w.pth"), 8)


def test_the_error_of_a_failed_download_names_the_alternatives(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    with pytest.raises(CheckpointError, match=r"--weights PATH .* or --weights none"):
        read_pretrained("imagenet", 8)
