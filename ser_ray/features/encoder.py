"""Runs pretrained speech encoders: the waveform of a clip becomes the mean of each layer over time.

The layers are those of the encoder's transformer. The weights come from torchaudio (WavLM, HuBERT,
wav2vec 2.0, XLS-R) or from a file. An encoder file, which `EncoderWeights.write` writes, is a
safetensors file with the `EncoderCard` in its metadata.

The network is torchaudio's, but `Encoder` calls its layers one by one, because torchaudio's
`extract_features` cannot handle padding in every family: WavLM refuses an attention mask, the
group norm of the base models counts the padding, and `normalize_waveform` scales a batch as a
whole. `Encoder` masks the padding in all three places. A clip's values therefore do not depend on
the other clips of its batch, except for rounding. A clip that is encoded alone has the same values
as from `extract_features`.
"""

import hashlib
import json
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from pyarrow import fs
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.parametrize import remove_parametrizations

from ser_ray.cluster.resources import available_memory
from ser_ray.errors import EncoderError
from ser_ray.features.bundles import bundle_card, download
from ser_ray.features.encoder_card import ENCODER_RATE, METADATA, EncoderCard
from ser_ray.storage.paths import filesystem_of
from ser_ray.storage.tensors import DAMAGED, read_tensors

MAX_BATCH_SECONDS = {"cpu": 0, "cuda": 240}
"""Largest number of seconds in a batch, including padding, by type of device. On a CPU, each clip
is a batch, which takes a sixth less time than batches of 8 s (WavLM Base+ on one core)."""
CONSTRUCTORS = {
    "Wav2Vec2": torchaudio.models.wav2vec2_model,
    "WavLM": torchaudio.models.wavlm_model,
}


@dataclass(frozen=True, slots=True)
class EncoderWeights:
    """The weights of an encoder, as float32 and with the network's names, and their card."""

    card: EncoderCard
    tensors: dict[str, Tensor]

    @classmethod
    def load(cls, source: str) -> "EncoderWeights":
        """Load the encoder that `prepare --encoder` names.

        Args:
            source: name of a bundle of torchaudio in lower case, whose weights are downloaded once;
                or NAME=FILE. FILE is an encoder file, or has the weights of the bundle NAME.

        Raises:
            ConfigError: there is no such bundle, or an encoder must not have this name.
            EncoderError: the weights cannot be downloaded or read, belong to another network, or
                do not fit into memory.
        """
        name, _, file = source.partition("=")
        if not file:
            card = bundle_card(name)
            num_bytes = sum(value.nbytes for value in _build(card).parameters())
            _require_memory(name, 2 * num_bytes)  # torchaudio copies them into a network
            return cls.from_tensors(card, download(name), name)
        with local_file(file) as path:
            _require_memory(name, path.stat().st_size)
            if _has_card(path):
                stored = cls.read(str(path))
                return cls(replace(stored.card, name=name), stored.tensors)
            tensors = _read_file(path, file)
            return cls.from_tensors(bundle_card(name), tensors, file)

    @classmethod
    def read(cls, location: str) -> "EncoderWeights":
        """Read an encoder file at a path or URI.

        Raises:
            EncoderError: the file is missing, damaged or not an encoder file.
        """
        with local_file(location) as path:
            with path.open("rb") as file:
                card = EncoderCard.from_file(file, location)
            tensors = _read_file(path, location)
        found = cls.from_tensors(card, tensors, location)
        if found.card.weights != card.weights:
            raise EncoderError(
                f"{location}: its weights have the hash {found.card.weights[:16]}, and its card "
                f"says {card.weights[:16] or 'none'}, so the file is damaged; "
                "delete it and fetch it again"
            )
        return found

    @classmethod
    def from_tensors(
        cls, card: EncoderCard, tensors: dict[str, Tensor], where: str
    ) -> "EncoderWeights":
        """Check that tensors are weights of the network, and return them with the network's names.

        Args:
            card: describes the network. The hash of the weights is added.
            tensors: the weights. The names of older versions of torch are allowed.
            where: where the tensors come from, for the message.

        Raises:
            EncoderError: the tensors belong to another network, or some are missing.
        """
        tensors = {key.removeprefix("model."): value for key, value in tensors.items()}
        tensors = {key: value for key, value in tensors.items() if not key.startswith("aux.")}
        network = _build(card)
        try:
            # Also renames the tensors of weight norms that older versions of torch saved.
            network.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise EncoderError(
                f"{where}: does not hold the weights of {card.name} ({reason}); give the weights "
                "of that network, or the name of the network that these weights belong to"
            ) from error
        tensors = {key: value.float().contiguous() for key, value in network.state_dict().items()}
        return cls(replace(card, weights=hash_of(tensors)), tensors)

    def write(self, path: Path) -> None:
        """Write the weights and their card as an encoder file."""
        save_file(self.tensors, path, metadata={METADATA: json.dumps(asdict(self.card))})

    def build(self) -> "Encoder":
        """Build the encoder, which shares the memory of the weights."""
        network = _build(self.card)
        network.load_state_dict(self.tensors, assign=True)
        _remove_weight_norm(network)
        return Encoder(self.card, network)


class Encoder(nn.Module):
    """Maps waveforms to the mean of every layer over time. It is built in evaluation mode.

    An encoder is pickled as NumPy arrays, so that all Ray processes on a machine share its memory.
    """

    network: Any

    def __init__(self, card: EncoderCard, network: Any) -> None:
        super().__init__()
        self.card, self.network = card, network
        self.eval().requires_grad_(False)

    def __reduce__(self) -> tuple[Any, ...]:
        arrays = {key: value.cpu().numpy() for key, value in self.network.state_dict().items()}
        return _from_arrays, (self.card, arrays)

    def forward(self, waves: Tensor, num_samples: Tensor | None = None) -> Tensor:
        """Return the mean of every layer over the valid frames [batch, layers, dim].

        Args:
            waves: [batch, samples] at 16 kHz.
            num_samples: number of valid samples of each waveform [batch]; None if all are valid.
        """
        if self.card.normalises:
            waves = _standardised(waves, num_samples, 1e-5)
        frames, num_frames = self._convolve(waves[:, None], num_samples)
        hidden = self.network.encoder.feature_projection(frames)
        valid = attention = padding = None
        if num_frames is not None:
            valid = torch.arange(hidden.shape[1], device=hidden.device) < num_frames[:, None]
            hidden = hidden * valid[:, :, None]
            if self.card.family == "WavLM":
                padding = torch.zeros_like(hidden[..., 0]).masked_fill(~valid, -torch.inf)
            else:
                attention = valid[:, None, None].expand(-1, 1, hidden.shape[1], -1)
        transformer = self.network.encoder.transformer
        hidden, bias, means = hidden + transformer.pos_conv_embed(hidden), None, []
        if transformer.layer_norm_first:
            hidden = transformer.layer_norm(hidden)
        for layer in transformer.layers:
            hidden, bias = layer(hidden, attention, bias, padding)
            if valid is None or num_frames is None:
                means.append(hidden.mean(dim=1))
            else:
                means.append((hidden * valid[:, :, None]).sum(dim=1) / num_frames[:, None])
        return torch.stack(means, dim=1)

    @torch.inference_mode()
    def encode(self, waves: Sequence[np.ndarray]) -> np.ndarray:
        """Encode clips, in batches of similar length.

        Args:
            waves: waveforms [samples] float32 at 16 kHz.

        Returns:
            [clips, layers, dim] float32.
        """
        device = next(self.network.parameters()).device
        lengths = np.array([len(wave) for wave in waves], np.int64)
        result = np.empty((len(waves), self.card.num_layers, self.card.dim), np.float32)
        for rows in batches_by_length(lengths, MAX_BATCH_SECONDS[device.type] * ENCODER_RATE):
            padded = np.zeros((len(rows), lengths[rows[-1]]), np.float32)
            for place, row in zip(padded, rows, strict=True):
                place[: lengths[row]] = waves[row]
            valid = torch.from_numpy(lengths[rows]).to(device)
            has_padding = lengths[rows[0]] < lengths[rows[-1]]
            batch = torch.from_numpy(padded).to(device)
            result[rows] = self(batch, valid if has_padding else None).cpu().numpy()
        return result

    def _convolve(self, maps: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Convert waveforms [batch, 1, samples] to frames [batch, frames, channels].

        `valid` is the number of valid samples [batch], or None if all are valid. The number of
        valid frames is returned too.
        """
        for block in self.network.feature_extractor.conv_layers:
            maps, norm = block.conv(maps), block.layer_norm
            if valid is not None:
                valid = (
                    torch.div(valid - block.kernel_size, block.stride, rounding_mode="floor") + 1
                )
            if isinstance(norm, nn.GroupNorm) and valid is not None:  # a group is one channel
                maps = _standardised(maps, valid[:, None], norm.eps)
                maps = torch.addcmul(norm.bias[:, None], maps, norm.weight[:, None])
            elif norm is not None:
                maps = norm(maps)
            maps = F.gelu(maps)
        return maps.transpose(1, 2), valid


def batches_by_length(lengths: np.ndarray, max_samples: int) -> Iterator[np.ndarray]:
    """Yield batches of clips: the indices of the clips, from the shortest to the longest.

    Args:
        lengths: number of samples of each clip [clips].
        max_samples: largest number of samples in a batch, including padding. A longer clip is a
            batch of its own.
    """
    order = np.argsort(lengths, kind="stable")
    first = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or lengths[order[end]] * (end + 1 - first) > max_samples:
            yield order[first:end]
            first = end


def hash_of(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of named tensors, in hex digits."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.contiguous().numpy().data)
    return digest.hexdigest()


@contextmanager
def local_file(location: str) -> Iterator[Path]:
    """Yield the path of a file. A file in a bucket is copied to this machine for the `with` block.

    Raises:
        EncoderError: the file does not exist, or its storage does not answer.
    """
    filesystem, path = filesystem_of(location)
    local = Path(path)
    with ExitStack() as stack:
        try:
            if not isinstance(filesystem, fs.LocalFileSystem):
                local = Path(stack.enter_context(tempfile.TemporaryDirectory()), local.name)
                fs.copy_files(path, str(local), source_filesystem=filesystem)
            elif not local.is_file():
                raise FileNotFoundError("no such file")
        except OSError as error:
            raise EncoderError(
                f"{location}: the encoder's weights cannot be read ({error}); check the path"
            ) from error
        yield local


def _has_card(path: Path) -> bool:
    """Return whether a file is a safetensors file with the card of an encoder."""
    if path.suffix != ".safetensors":
        return False
    with suppress(*DAMAGED, OSError), safe_open(path, "pt") as file:
        return METADATA in (file.metadata() or {})
    return False


def _read_file(path: Path, location: str) -> dict[str, Tensor]:
    """Read the tensors of a file of weights; other values in it are left out."""
    try:
        content = read_tensors(path)
        return {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    except (ValueError, AttributeError) as error:
        raise EncoderError(
            f"{location}: is not a readable file of weights ({error}); delete it and fetch it again"
        ) from error


def _build(card: EncoderCard) -> Any:
    """Build the card's network, without weights.

    Raises:
        EncoderError: the constructor refuses the card's arguments.
    """
    try:
        with torch.device("meta"):
            return CONSTRUCTORS[card.family](**card.arguments)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise EncoderError(
            f"the encoder {card.name} cannot be built by torchaudio ({str(error)[:200]}); correct "
            "the arguments in its card"
        ) from error


def _require_memory(name: str, num_bytes: int) -> None:
    """Check that an encoder fits into this machine's memory, before its weights are read.

    Args:
        name: name of the encoder, for the message.
        num_bytes: memory for its weights.

    Raises:
        EncoderError: the encoder needs more memory than is free.
    """
    if num_bytes > (free := available_memory()):
        raise EncoderError(
            f"the encoder {name} needs {num_bytes / 1e9:.1f} GB of memory, and this machine has "
            f"{free / 1e9:.1f} GB free: choose a smaller encoder, or a machine with more"
        )


def _from_arrays(card: EncoderCard, arrays: dict[str, np.ndarray]) -> Encoder:
    network = _build(card)
    _remove_weight_norm(network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the arrays are read-only, as they should be
        tensors = {key: torch.from_numpy(value) for key, value in arrays.items()}
    network.load_state_dict(tensors, assign=True)
    return Encoder(card, network)


def _remove_weight_norm(network: Any) -> None:
    """Store the weight of the positional convolution, instead of computing it in every pass."""
    remove_parametrizations(network.encoder.transformer.pos_conv_embed.conv, "weight")


def _standardised(values: Tensor, valid: Tensor | None, eps: float) -> Tensor:
    """Scale values [..., length] to mean 0 and variance 1 over the last dimension.

    Only the first `valid` [...] values count; the others become 0. If `valid` is None, all count.
    """
    if valid is None:
        return F.layer_norm(values, values.shape[-1:], eps=eps)
    inside = torch.arange(values.shape[-1], device=values.device) < valid[..., None]
    mean = (values * inside).sum(dim=-1, keepdim=True) / valid[..., None]
    centred = (values - mean) * inside
    return centred * (centred.square().sum(dim=-1, keepdim=True) / valid[..., None] + eps).rsqrt()
