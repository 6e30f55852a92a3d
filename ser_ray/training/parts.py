"""Selects the clips of a fold's training, validation and test parts. It does not import torch."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from ser_ray.corpus.folds import ALL
from ser_ray.corpus.splits import Split, one_clip_per_take, split, windows_of
from ser_ray.errors import ConfigError
from ser_ray.training.recipe import TrainConfig


def select_rows(clips: pa.Table, config: TrainConfig) -> Split:
    """Select the rows of `clips` that belong to each part of the configured fold.

    Each part has one clip per take (the wav if there is one) of the configured channel, in the
    order of the takes. The training part has all windows of a long clip, the others only the first.

    Raises:
        ConfigError: a part of the fold is empty, or its training clips have one label only. With
            the protocol all, only the training part must have clips.
    """
    rows = one_clip_per_take(clips)
    rows = rows[np.argsort(np.asarray(clips["take"].take(rows).to_pylist()), kind="stable")]
    parts = split(
        config.protocol,
        config.fold,
        clips.take(rows),
        seed=config.seed,
        validation_speakers=config.validation_speakers,
    )

    def select(part: np.ndarray, channel: str, name: str) -> np.ndarray:
        kept = on_channel(clips, rows[part], channel)
        if not len(kept) and not (config.protocol == ALL and name != "training"):
            raise ConfigError(
                f"{parts.label}: the {name} part holds no {channel} clip; choose another channel"
            )
        return kept

    train = select(parts.train, config.train_channel, "training")
    labels = set(clips["emotion"].take(train).to_pylist())
    if len(labels) < 2:
        raise ConfigError(
            f"{parts.label}: all its training clips have the label {labels.pop()!r}, so there is "
            "nothing to tell apart; add clips with another label"
        )
    return replace(
        parts,
        train=windows_of(clips["window"].to_numpy(), train)[0],
        validation=select(parts.validation, config.channel, "validation"),
        test=select(parts.test, config.channel, "test"),
        left_out=rows[parts.left_out],
    )


def on_channel(clips: pa.Table, rows: np.ndarray, channel: str) -> np.ndarray:
    """Select the rows [rows] of a channel: speech, song or all.

    Clips without a channel (those of a table) are always selected.
    """
    channels = clips["channel"].take(rows).to_pylist()
    keep = [channel == "all" or found in (channel, None) for found in channels]
    return rows[np.asarray(keep, dtype=bool)]


def describe_split(parts: Split) -> dict[str, Any]:
    """Describe a split for a card: its name, and the speakers of each part."""
    return {
        "label": parts.label,
        "speaker_dependent": parts.speaker_dependent,
        "train_speakers": list(parts.train_speakers),
        "validation_speakers": list(parts.validation_speakers),
        "test_speakers": list(parts.test_speakers),
    }
