"""The speech encoders that torchaudio publishes: networks, weights, licences and training data."""

import pickle
from typing import Any
from urllib.error import URLError

import torch
import torchaudio

from ser_ray.errors import ConfigError, EncoderError
from ser_ray.features.encoder_card import EncoderCard

_ASR = ", then fine-tuned for speech recognition"
TRAINED_ON = {
    "960 hours of LibriSpeech": ("wav2vec2_base", "wav2vec2_large", "hubert_base", "wavlm_base"),
    "60,000 hours of Libri-Light": ("wav2vec2_large_lv60k", "hubert_large", "hubert_xlarge"),
    "60,000 hours of Libri-Light, 10,000 hours of GigaSpeech and 24,000 hours of VoxPopuli": (
        "wavlm_base_plus", "wavlm_large",
    ),
    "56,000 hours of Multilingual LibriSpeech, CommonVoice and BABEL": ("wav2vec2_xlsr53",),
    "436,000 hours of Multilingual LibriSpeech, CommonVoice, VoxLingua107, BABEL and VoxPopuli": (
        "wav2vec2_xlsr_300m", "wav2vec2_xlsr_1b", "wav2vec2_xlsr_2b",
    ),
    f"960 hours of LibriSpeech{_ASR}": (
        "wav2vec2_asr_base_10m", "wav2vec2_asr_base_100h", "wav2vec2_asr_base_960h",
        "wav2vec2_asr_large_10m", "wav2vec2_asr_large_100h", "wav2vec2_asr_large_960h",
    ),
    f"60,000 hours of Libri-Light{_ASR}": (
        "wav2vec2_asr_large_lv60k_10m", "wav2vec2_asr_large_lv60k_100h",
        "wav2vec2_asr_large_lv60k_960h", "hubert_asr_large", "hubert_asr_xlarge",
    ),
    f"10,000 hours of VoxPopuli{_ASR}": (
        "voxpopuli_asr_base_10k_en", "voxpopuli_asr_base_10k_es", "voxpopuli_asr_base_10k_de",
        "voxpopuli_asr_base_10k_fr", "voxpopuli_asr_base_10k_it",
    ),
    "31,000 hours in 1,130 languages": ("mms_fa",),
}  # fmt: skip
"""{training data: bundles}, as the docstrings of the bundles in torchaudio say."""
NOT_COMMERCIAL = ("voxpopuli", "mms")
"""Prefixes of the names of bundles under CC BY-NC 4.0. The others are under the MIT License."""


def bundle_names() -> list[str]:
    """Return the names of torchaudio's encoders, in lower case."""
    return [name for names in TRAINED_ON.values() for name in names]


def bundle_card(name: str) -> EncoderCard:
    """Return the card of a bundle of torchaudio.

    The function reads private attributes of the bundle, because the public ones do not describe the
    network without downloading the weights.

    Raises:
        ConfigError: there is no bundle of this name.
    """
    if name not in (names := bundle_names()):
        pretrained = ", ".join(name for name in names if "_asr_" not in name)
        raise ConfigError(
            f"encoder is {name}: it must be one of {pretrained}, a bundle of torchaudio for speech "
            "recognition, as in hubert_asr_large, or NAME=FILE. FILE has the weights of the bundle "
            "NAME, or is an encoder file, for which any NAME is allowed"
        )
    bundle = _bundle(name)
    return EncoderCard(
        name=name,
        family=bundle._model_type,
        arguments=bundle._params | {"aux_num_out": None},
        normalises=bundle._normalize_waveform,
        licence="CC BY-NC 4.0" if name.startswith(NOT_COMMERCIAL) else "MIT License",
        trained_on=next(text for text, names in TRAINED_ON.items() if name in names),
    )


def download(name: str) -> dict[str, torch.Tensor]:
    """Return the weights of a bundle, which torchaudio downloads once to its cache.

    Raises:
        EncoderError: the weights cannot be downloaded, or are damaged in the cache.
    """
    bundle = _bundle(name)
    options = {"map_location": "cpu", "progress": False, "weights_only": True}
    try:
        return dict(bundle.get_model(dl_kwargs=options).state_dict())
    except (URLError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise EncoderError(
            f"the weights of {name} cannot be downloaded to {torch.hub.get_dir()}, or are damaged "
            f"there ({error}); put their file ({bundle._path}) on this machine and give "
            f"--encoder {name}=FILE"
        ) from error


def _bundle(name: str) -> Any:
    return getattr(torchaudio.pipelines, name.upper())
