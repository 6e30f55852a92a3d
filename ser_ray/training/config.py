"""What a training is: the recipe, apart from where it runs. Importing this is cheap."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from ser_ray.errors import ConfigError
from ser_ray.features.config import Kind, require_finite

Keep = Literal["last", "best"]
"""Which epoch's weights a training keeps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """What is done to a training batch; every field has a value that switches it off."""

    random_crop: bool = True
    """Cut longer clips, and lay shorter ones into the crop, at random; else in the middle."""
    mix_style: float = 0.5
    """Share of the clips that get another clip's mean and spread over time in every bin, or a part
    of it drawn uniformly (MixStyle, Zhou 2021): what tells voices apart, more than emotions. 0 is
    off, and better where the voices are known, as in `random`."""
    gain_db: float = 6.0
    """Level drawn uniformly within ± this many dB for each clip; 0 is off."""
    tempo: float = 0.0
    """Each clip is spoken up to this share slower or faster; 0 is off."""
    vtlp: float = 0.0
    """Vocal-tract-length perturbation (Jaitly and Hinton 2013): multiply the frequencies of each
    clip by a factor within 1 ± this share, up to 4.8 kHz of 8, as if the speaker had a shorter or
    longer vocal tract. Has no effect on mfcc; 0 is off."""
    time_masks: int = 2
    """SpecAugment: masks in time for each clip; 0 is off."""
    time_mask_frames: int = 16
    """SpecAugment: the longest mask in time, in frames."""
    freq_masks: int = 2
    """SpecAugment: masks in frequency for each clip; 0 is off."""
    freq_mask_share: float = 0.15
    """SpecAugment: the widest mask in frequency, as a share of the bins."""
    mixup: float = 0.2
    """Mixup: both parameters of the Beta distribution (Zhang 2018); 0 is off."""

    def __post_init__(self) -> None:
        require_finite(self)
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value < 0:
                raise ConfigError(f"{item.name} is {value}: it must be 0 (off) or above")
        for name in ("mix_style", "freq_mask_share", "tempo"):
            if getattr(self, name) > 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at most 1")
        if self.vtlp >= 1:
            raise ConfigError(f"vtlp is {self.vtlp}: it must be below 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The recipe of one training. The same recipe on the same shards is the same run anywhere."""

    feature: Kind = "mel"
    """Feature kind the network sees."""
    protocol: str = "emobox-6"
    """Who is trained on and who is tested: emobox-6, luna-5, loso, speaker-K (K folds by speaker)
    or random (speaker-dependent)."""
    fold: int = 0
    """Fold of the protocol, from 0."""
    validation_speakers: int = 0
    """Speakers of the training part that validate instead of being learned from, in every protocol
    but random. If 0, a twelfth of the corpus's speakers, at least two and at most a
    third of those that are not tested."""
    channel: Literal["speech", "song", "all"] = "speech"
    """Clips that validation and test consist of."""
    train_channel: Literal["speech", "song", "all"] = "all"
    """Clips of the training speakers that are learned from."""
    epochs: int = 48
    """Passes over the training rows."""
    batch_size: int = 32
    """Clips in a step, over all workers together."""
    lr_min: float = 1e-4
    """OneCycle: learning rate at the first step."""
    lr_max: float = 2e-3
    """OneCycle: learning rate at the peak."""
    pct_start: float = 0.3
    """OneCycle: share of the steps spent rising."""
    final_div_factor: float = 100.0
    """OneCycle: the last step's rate is lr_min divided by this."""
    weight_decay: float = 0.02
    """AdamW's weight decay."""
    label_smoothing: float = 0.1
    """Share of the target spread over all labels; 0 is off."""
    balanced: bool = False
    """Draw every label equally often instead of as often as it occurs."""
    sam_rho: float = 0.0
    """Sharpness-aware minimisation (SAM, Foret 2021): every step takes the gradient from this far
    up the slope, where the loss is worst nearby, for twice the time; 0 is off."""
    ema_decay: float = 0.0
    """Decay per step of the averaged weights that are validated and kept (EMA); 0 is off."""
    keep: Keep = "last"
    """Epoch whose weights are kept: the last, when the learning rate has come down, or the best on
    validation: of few speakers, that is often an early one, by luck."""
    patience: int = 0
    """With `--keep best`: stop after this many epochs without a better validation UA; 0 never stops
    early."""
    crop_frames: int = 128
    """Frames of a clip seen at once; a longer clip is scored by windows of this length."""
    weights: str = "imagenet"
    """Where the network starts: imagenet, none, or a file of ResNet18 weights."""
    seed: int = 0
    """Seed of the initial weights, the order of the clips and the augmentation."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        require_finite(self)
        for name in ("epochs", "batch_size", "crop_frames", "lr_min", "lr_max"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be above 0")
        whole_numbers = ("fold", "validation_speakers", "patience", "seed")
        for name in (*whole_numbers, "weight_decay", "sam_rho"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be 0 or above")
        for name in ("label_smoothing", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be in [0, 1)")
        if self.patience and self.keep == "last":
            raise ConfigError(
                f"patience is {self.patience}, but it is the last epoch that is kept, and one that "
                "stops early has a high learning rate still: give --keep best with it"
            )
        self._require_schedule()

    def _require_schedule(self) -> None:
        if self.lr_min >= self.lr_max:
            raise ConfigError(
                f"lr_min is {self.lr_min:g} and lr_max is {self.lr_max:g}: the learning rate rises "
                "from lr_min to lr_max, so lr_min must be the smaller one (are they swapped?)"
            )
        if not 0 < self.pct_start < 1:
            raise ConfigError(f"pct_start is {self.pct_start}: it must be between 0 and 1")
        if self.final_div_factor < 1:
            raise ConfigError(f"final_div_factor is {self.final_div_factor}: it must be >= 1")

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that differ when any field does."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """Plain nested mapping, for cards and the tracker."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """Read what `to_dict` wrote. A missing setting has its default.

        Raises:
            ConfigError: a setting is unknown; the message lists the known ones.
        """
        augment = values.get("augment", {})
        _require_known(cls, values, "training")
        _require_known(AugmentConfig, augment, "augmentation")
        return cls(**(values | {"augment": AugmentConfig(**augment)}))


def _require_known(kind: type, values: dict[str, Any], what: str) -> None:
    known = {item.name for item in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - known):
        raise ConfigError(
            f"unknown {what} settings {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LrRangeConfig:
    """A learning-rate range test: the learning rate rises by an equal factor a step."""

    lowest: float = 1e-6
    """Learning rate of the first step."""
    highest: float = 1.0
    """Learning rate of the last step; the test ends earlier where the loss goes off."""
    steps: int = 200
    """Steps from one to the other."""

    def __post_init__(self) -> None:
        require_finite(self)
        if not 0 < self.lowest < self.highest:
            raise ConfigError(
                f"lowest is {self.lowest:g} and highest is {self.highest:g}: the learning rate "
                "rises from lowest to highest, and both are above 0"
            )
        if self.steps < 10:
            raise ConfigError(f"steps is {self.steps}: it must be at least 10")
