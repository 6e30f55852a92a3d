"""Selects the clips of a fold's train, validation and test part, without importing torch."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from ser_ray.corpus.folds import ALL
from ser_ray.corpus.splits import Split, one_clip_per_take, speakers_of, split, windows_of
from ser_ray.errors import ConfigError
from ser_ray.training.recipe import TrainConfig


def select_rows(clips: pa.Table, recipe: TrainConfig) -> Split:
    """Select the rows of `clips` that belong to each part of the recipe's fold.

    Each part has one clip per take (the wav if there is one) of the channel in the recipe, sorted
    by take. The train part has all rows of a long clip, and the other parts have only the first
    row.

    Raises:
        ConfigError: a part of the fold is empty, or all training clips have the same label. With
            the protocol all, only the train part must have clips.
    """
    rows = one_clip_per_take(clips)
    rows = rows[np.argsort(np.asarray(clips["take"].take(rows).to_pylist()), kind="stable")]
    parts = split(
        recipe.protocol,
        recipe.fold,
        clips.take(rows),
        seed=recipe.seed,
        validation_speakers=recipe.validation_speakers,
    )

    def select(part: np.ndarray, channel: str, name: str) -> np.ndarray:
        selected = on_channel(clips, rows[part], channel)
        may_be_empty = recipe.protocol == ALL and name != "training"
        if not len(selected) and not may_be_empty:
            raise ConfigError(
                f"{parts.label}: the {name} part holds no {channel} clip; choose another channel"
            )
        return selected

    train = select(parts.train, recipe.train_channel, "training")
    labels = set(clips["emotion"].take(train).to_pylist())
    if len(labels) < 2:
        raise ConfigError(
            f"{parts.label}: all training clips have the label {labels.pop()!r}, so there is "
            "nothing to learn; add clips with another label"
        )
    validation = select(parts.validation, recipe.channel, "validation")
    test = select(parts.test, recipe.channel, "test")
    return replace(
        parts,
        train=windows_of(clips["window"].to_numpy(), train)[0],
        validation=validation,
        test=test,
        train_speakers=speakers_of(clips, train),
        validation_speakers=speakers_of(clips, validation),
        test_speakers=speakers_of(clips, test),
        left_out=rows[parts.left_out],
    )


def on_channel(clips: pa.Table, rows: np.ndarray, channel: str) -> np.ndarray:
    """Select the rows [rows] of a channel: speech, song or all.

    Clips without a channel (those of a table) are always selected.
    """
    channels = clips["channel"].take(rows).to_pylist()
    is_selected = [channel == "all" or value in (channel, None) for value in channels]
    return rows[np.asarray(is_selected, dtype=bool)]


def describe_split(parts: Split) -> dict[str, Any]:
    """Return the entries of a split in a card: its name, and the speakers of each part."""
    return {
        "label": parts.label,
        "speaker_dependent": parts.speaker_dependent,
        "train_speakers": list(parts.train_speakers),
        "validation_speakers": list(parts.validation_speakers),
        "test_speakers": list(parts.test_speakers),
    }
