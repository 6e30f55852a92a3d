"""The recipe of a training. `ser_ray.distributed.run_config` sets where a training runs. `--help`
imports this module, so it imports no slow library."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from ser_ray.errors import ConfigError
from ser_ray.features.config import KINDS, require_range, require_valid

Keep = Literal["last", "best"]
"""Which epoch is selected. The weights of the selected epoch become the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """Augmentation of a training batch. Every field has a value that switches it off."""

    random_crop: bool = True
    """Start the crop of a longer clip at a random frame, and place a shorter clip at random in the
    crop; `--no-random-crop` centres the crop in longer clips, and shorter clips in the crop."""
    noise: float = 0.5
    """Share of the clips that get noise, from white to brown and from -80 to -30 dBFS; 0 is off."""
    echo: float = 0.5
    """Share of the clips that get the echo of a room, with a reverberation time of 0.1 to 0.8 s; 0
    is off."""
    band_limit: float = 0.5
    """Share of the clips that pass a narrow channel, such as a telephone: a low-pass filter at 2.5
    to 7 kHz and, for half of these clips, a high-pass filter at 50 to 400 Hz; 0 is off."""
    mix_style: float = 0.5
    """MixStyle (Zhou 2021): share of the clips in which the mean and standard deviation of every
    bin over time are mixed with those of another clip; 0 is off. These statistics depend more on
    the speaker than on the emotion. With the protocol random, which tests known speakers, MixStyle
    is always off."""
    gain_db: float = 6.0
    """Change the level of each clip by a random value of up to ± this many dB; 0 is off."""
    time_masks: int = 2
    """SpecAugment: number of time masks for each clip; 0 is off."""
    time_mask_frames: int = 16
    """SpecAugment: maximum length of a time mask, in frames."""
    freq_masks: int = 2
    """SpecAugment: number of frequency masks for each clip; 0 is off."""
    freq_mask_share: float = 0.15
    """SpecAugment: maximum width of a frequency mask, as a share of the bins."""
    mixup: float = 0.2
    """Mixup (Zhang 2018): alpha, which is both parameters of the Beta distribution; 0 is off."""

    def __post_init__(self) -> None:
        require_valid(self)
        require_range(self, *(item.name for item in dataclasses.fields(self)), low=0)
        shares = ("noise", "echo", "band_limit", "mix_style", "freq_mask_share")
        require_range(self, *shares, high=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The recipe of a training."""

    feature: str = "mel"
    """Kind of features: spectrogram, mel, mfcc, or the name of an encoder that `ser-ray prepare
    --encoder` added to the shards, such as wavlm_base_plus."""
    protocol: str = "emobox-6"
    """How speakers are split into training and test: emobox-6, luna-5, loso, speaker-K (K folds by
    speaker), table (by the column split of a table), cross-corpus (every corpus is tested in turn),
    random (speaker-dependent) or all (every speaker trains the model; no scores)."""
    fold: int = 0
    """Fold of the protocol, from 0."""
    validation_speakers: int = 0
    """Number of speakers held out for validation, in every protocol but random and all. 0 means one
    twelfth of the corpus's speakers, but at least two, and at most a third of the speakers that are
    not tested. If a table has validation clips, the protocol table uses these instead."""
    channel: Literal["speech", "song", "all"] = "speech"
    """Which validation and test clips of RAVDESS are used: speech, song or both."""
    train_channel: Literal["speech", "song", "all"] = "all"
    """Which training clips of RAVDESS are used: speech, song or both."""
    epochs: int = 96
    """Number of passes over the training clips."""
    batch_size: int = 32
    """Number of clips in a step, over all workers together."""
    lr_min: float = 1e-4
    """OneCycle: learning rate of the first step."""
    lr_max: float = 2e-3
    """OneCycle: peak learning rate."""
    pct_start: float = 0.3
    """OneCycle: share of the steps in which the learning rate rises."""
    final_div_factor: float = 100.0
    """OneCycle: the learning rate of the last step is lr_min divided by this."""
    weight_decay: float = 0.02
    """Weight decay of AdamW."""
    label_smoothing: float = 0.1
    """Label smoothing: share of each target that is spread evenly over all labels; 0 is off."""
    label_map: str = ""
    """How to merge labels: usual (anger, angry, ang, ... become one label), common (like usual, but
    labels that some corpora lack are left out), or a CSV file with the columns corpus,label,as. By
    default, usual is used if the corpora have different labels."""
    balanced: bool = False
    """Draw the training clips with replacement, so that all labels are equally likely."""
    corpus_balance: float = 0.0
    """With several corpora: 1 draws clips with replacement, so that all corpora are equally likely;
    0 does not balance corpora; values between are a compromise."""
    keep: Keep = "last"
    """Epoch whose weights become the model: the last, or the best on validation. With few
    validation speakers, the best epoch is often an early one by chance."""
    crop_frames: int = 128
    """Length of a training crop in frames. The probabilities of a longer clip are the mean over
    several windows of this length."""
    weights: str = "imagenet"
    """Initial weights: imagenet, none, a file of ResNet18 weights, or a model of this program (its
    folder, run id or registered name). If that model has other labels, the last layer gets fresh
    weights. The head on an encoder always gets fresh weights."""
    head_units: int = 0
    """For an encoder: units of a hidden layer before the last layer; 0 is a linear head."""
    allow_seen_labels: bool = False
    """Allow an encoder that was trained with labels of this corpus. Then the scores on new speakers
    are too high."""
    temperature: float = 1.0
    """Temperature of the probabilities with the protocol all, which has no validation clips to fit
    a temperature on. `--like` with the run of a cross-validation sets the geometric mean of the
    folds' temperatures."""
    seed: int = 0
    """Seed of the initial weights, the order of the clips and the augmentation."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        require_valid(self)
        positive = ("epochs", "batch_size", "crop_frames", "lr_min", "lr_max", "temperature")
        require_range(self, *positive, above=0)
        not_negative = ("fold", "validation_speakers", "seed", "weight_decay", "head_units")
        require_range(self, *not_negative, low=0)
        require_range(self, "corpus_balance", low=0, high=1)
        require_range(self, "label_smoothing", low=0, below=1)
        require_range(self, "pct_start", above=0, below=1)
        require_range(self, "final_div_factor", low=1)
        if self.protocol == "all" and self.keep == "best":
            raise ConfigError(
                "keep is best: the protocol all has no validation clips to find the best epoch; "
                "give --keep last"
            )
        if self.lr_min >= self.lr_max:
            raise ConfigError(
                f"lr_min is {self.lr_min:g} and lr_max is {self.lr_max:g}: the learning rate rises "
                "from lr_min to lr_max, so lr_min must be the smaller one (are they swapped?)"
            )

    @property
    def window_frames(self) -> int:
        """Length of the network's input in frames; the features of an encoder have one frame."""
        return self.crop_frames if self.feature in KINDS else 1

    @property
    def fingerprint(self) -> str:
        """Hash of all fields: twelve hexadecimal digits."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """Convert to a nested mapping of plain values, for JSON and MLflow."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """Build a recipe from a mapping that `to_dict` returned. A missing setting has its default.

        Raises:
            ConfigError: a setting is unknown or has a value that is not allowed.
        """
        _require_known(cls, values, "training")
        augment = values.get("augment", {})
        _require_known(AugmentConfig, augment, "augmentation")
        return cls(**(values | {"augment": AugmentConfig(**augment)}))


def _require_known(kind: type, values: dict[str, Any], what: str) -> None:
    if not isinstance(values, dict):
        raise ConfigError(f"the {what} settings are {repr(values)[:100]}: they must be a mapping")
    known = {item.name for item in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - known):
        raise ConfigError(
            f"unknown {what} settings {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LrRangeConfig:
    """A learning-rate range test. Each step multiplies the learning rate by the same factor."""

    lowest: float = 1e-6
    """Learning rate of the first step."""
    highest: float = 1.0
    """Learning rate of the last step. The test ends early when the loss diverges."""
    steps: int = 200
    """Number of steps."""

    def __post_init__(self) -> None:
        require_valid(self)
        require_range(self, "steps", low=10)
        if not 0 < self.lowest < self.highest:
            raise ConfigError(
                f"lowest is {self.lowest:g} and highest is {self.highest:g}: the learning rate "
                "rises from lowest to highest, and both must be above 0"
            )
