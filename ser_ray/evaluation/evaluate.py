"""Scores a checkpoint on the clips of a shard set, and writes no files.

Test parts are scored only here. Epochs, trials, and the fold whose model is registered are selected
by validation scores. By default, the test part of the checkpoint's own fold is scored. A fold of
another protocol, or other shards, can be scored too. There, speakers that the checkpoint was
trained or validated on are refused, unless the user allows them. Their names are then shown beside
every score.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ser_ray.corpus.folds import ALL
from ser_ray.corpus.splits import one_clip_per_take
from ser_ray.errors import CheckpointError, ConfigError, ResourcesError, ShardsError
from ser_ray.evaluation.evaluation import Evaluation, Part, predictions_table
from ser_ray.evaluation.statistics import Comparison
from ser_ray.shards.card import have_prefixes
from ser_ray.shards.config import ShardLocations
from ser_ray.shards.corpora import open_corpora
from ser_ray.shards.read import ShardSet
from ser_ray.storage.json_text import read_object
from ser_ray.tracking.database import SCHEME
from ser_ray.training.calibration import apply_temperature
from ser_ray.training.checkpoint import SELECTED, read_card, read_network
from ser_ray.training.checkpoint_card import CheckpointCard
from ser_ray.training.data import load_clips
from ser_ray.training.model import to_channels_last
from ser_ray.training.parts import on_channel, select_rows
from ser_ray.training.scoring import predict_clips


def evaluate(
    checkpoint: Path,
    locations: ShardLocations,
    *,
    label_map: str = "",
    part: Part = "test",
    protocol: str = "",
    fold: int | None = None,
    allow_seen_speakers: bool = False,
    probabilities: np.ndarray | None = None,
) -> Evaluation:
    """Score a checkpoint on one part of a fold, or on all clips of other shards.

    Args:
        checkpoint: directory of the checkpoint.
        locations: the shard sets of the training, or other shard sets with the same features.
        label_map: how labels are mapped (`ser_ray.corpus.labels`). If empty, shards of the training
            are mapped as in the training, and other shards by `usual` if the model does not know
            all their labels.
        part: which part of the fold to score.
        protocol: protocol of the fold. If empty, shards of the training are scored with the
            training's protocol. Of other shards, all takes on the recipe's channel are scored.
        fold: number of the fold. None means the training's fold, or fold 0 of another protocol.
        allow_seen_speakers: also score speakers that the model was trained or validated on.
        probabilities: probabilities [clips, labels] of the part's clips before the temperature is
            applied. If None, the clips are read, and their probabilities are computed here.

    Raises:
        CheckpointError: the directory is not a checkpoint, or the shards hold other features,
            unknown labels, or speakers that the model was trained or validated on.
        ShardsError: there is no committed shard set at that location.
        ConfigError: the locations, label map, protocol or fold do not fit, or there is no clip to
            score.
    """
    card = read_card(checkpoint)
    shards = open_corpora(locations, label_map, known=card.corpora, labels=card.labels)
    _require_same_features(card, shards)
    table = shards.clips()
    rows, label, is_own = _select_scored(card, shards, table, part, protocol, fold)
    seen = () if is_own else _seen_speakers(card, table, rows)
    if seen and not allow_seen_speakers:
        raise CheckpointError(
            f"{shards.uri}: the model was trained or validated on {len(seen)} of these speakers "
            f"({', '.join(seen)}), so scores on them do not hold for new speakers; give shards of "
            "other speakers, or add --allow-seen-speakers (also if these are different people with "
            "the same names)"
        )
    if probabilities is None:
        probabilities = _score(checkpoint, card, shards, table, rows)
    is_own_test, origin = is_own and part == "test", origin_of(checkpoint)
    return Evaluation(
        card=card,
        part=part,
        protocol=label,
        corpus=shards.card.corpus,
        corpora=shards.corpora,
        is_own_test=is_own_test,
        seen_speakers=seen,
        predictions=predictions_table(
            table.take(rows), apply_temperature(probabilities, card.temperature), card.labels
        ),
        origin=origin,
        shards=shards.locations,
        report=origin.get("report", "") if is_own_test else "",
    )


def compare(first: Evaluation, second: Evaluation) -> Comparison:
    """Compare two models that were scored on the same clips.

    Raises:
        ConfigError: the clips or the models' labels differ.
    """
    takes, other_takes = (item.predictions["take"].to_pylist() for item in (first, second))
    if first.card.labels != second.card.labels or takes != other_takes:
        raise ConfigError(
            f"the two models were scored on different clips ({len(takes)} and {len(other_takes)}) "
            "or have different labels, but a paired test needs the same clips and labels; choose a "
            "--protocol and --fold with test speakers that neither model was trained on"
        )
    return first.compare(first.predicted, second.predicted, len(first.card.labels))


def origin_of(checkpoint: Path) -> Mapping[str, Any]:
    """Return the record that a training wrote beside its checkpoint; empty if there is none.

    The record holds the `run_id` and `tracking_uri` of the MLflow run, and the locations of the
    `report` and the `shards`. If the run folder was moved or copied after the training, local paths
    are adapted to the new place, so that nothing is written to the old place. The path of a shard
    set changes only if the shard set was moved or copied too.

    Raises:
        CheckpointError: the record is damaged.
    """
    path = checkpoint / "run.json"
    if not path.is_file():
        return {}
    try:
        origin = read_object(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path}: is damaged ({error}); restore or delete it") from error
    old = origin.get("report", "").rpartition("/")[0]  # the run folder when the run was trained
    new = str(checkpoint.absolute().parent)
    if checkpoint.name == SELECTED and old and "://" not in old and old != new:
        for name in ("tracking_uri", "report"):
            origin[name] = _relocate(origin[name], old, new)
        for index, location in enumerate(origin["shards"]):
            relocated = _relocate(location, old, new)
            if os.path.exists(relocated):  # noqa: PTH110
                origin["shards"][index] = relocated
    return origin


def _relocate(location: str, old: str, new: str) -> str:
    """Return the path of a file after the folder `old` was moved to `new`. URIs do not change."""
    scheme = SCHEME if location.startswith(SCHEME) else ""
    path = location.removeprefix(scheme)
    if "://" in path:
        return location
    return scheme + os.path.normpath(os.path.join(new, os.path.relpath(path, old)))  # noqa: PTH118


def shards_of(checkpoint: Path, default_locations: Sequence[str]) -> tuple[str, ...]:
    """Find the shard sets that a model was trained on.

    Args:
        default_locations: locations to try if the shards are not where the training read them.

    Raises:
        ShardsError: no location holds these shards.
    """
    card = read_card(checkpoint)
    recorded = tuple(origin_of(checkpoint).get("shards", ()))
    candidates = [recorded] if recorded else []
    candidates += [(location,) for location in default_locations]
    for locations in candidates:
        with suppress(ShardsError, ConfigError, ResourcesError):
            shards = open_corpora(locations, known=card.corpora)
            if shards.card.fingerprint == card.shards_fingerprint:
                return locations
    raise ShardsError(
        f"the shards that the model was trained on ({card.trained_on}) are not in "
        f"{' or '.join(map(' and '.join, candidates))}: give their location, or shards of other "
        "speakers, with --shards"
    )


def _select_scored(
    card: CheckpointCard,
    shards: ShardSet,
    table: pa.Table,
    part: Part,
    protocol: str,
    fold: int | None,
) -> tuple[np.ndarray, str, bool]:
    """Select the rows to score.

    Returns:
        Row numbers [clips], the protocol and fold as text, and whether they are those of the
        training.
    """
    config = card.config
    is_same_data = card.shards_fingerprint == shards.card.fingerprint
    if not (is_same_data or protocol):
        if fold is not None:
            raise ConfigError(
                f"fold is {fold}, but the model was trained on other shards, so all speakers of "
                "these shards are scored: give a --protocol too"
            )
        rows = on_channel(table, one_clip_per_take(table), config.channel)
        if not len(rows):
            raise ConfigError(
                f"{shards.uri}: these shards hold no {config.channel} clip, and the recipe of "
                "the model scores no other channel"
            )
        return rows, f"all speakers of {shards.card.source}", False
    is_same_protocol = protocol in ("", config.protocol)
    if fold is None:
        fold = config.fold if is_same_protocol else 0
    is_own = is_same_data and is_same_protocol and fold == config.fold
    recipe = replace(
        config,
        protocol=protocol or config.protocol,
        fold=fold,
        # Other folds and corpora use the default number of validation speakers.
        validation_speakers=config.validation_speakers if is_own else 0,
    )
    parts = select_rows(table, recipe)
    rows = getattr(parts, part)
    if not len(rows):
        raise ConfigError(
            f"{shards.uri}: protocol {ALL} has no {part} part, because every speaker is in the "
            "training part: give shards of other speakers"
        )
    return rows, parts.label, is_own


def _seen_speakers(card: CheckpointCard, table: pa.Table, rows: np.ndarray) -> tuple[str, ...]:
    """Return the speakers of these rows that the model was trained or validated on, by name.

    If a model was trained on several corpora, its speakers may have names like `emodb:03`. In other
    shards, the same person may have a name without a prefix, or with another prefix.
    """
    seen = {*card.split["train_speakers"], *card.split["validation_speakers"]}
    seen_people = {name.rpartition(":")[2] for name in seen}
    prefixes = {corpus.name: f"{corpus.prefix}:" for corpus in card.corpora}
    has_prefixes = have_prefixes(card.corpora)

    def is_seen(speaker: str, corpus: str) -> bool:
        if corpus not in prefixes:
            return speaker in seen or speaker.rpartition(":")[2] in seen_people
        person = speaker.removeprefix(prefixes[corpus])
        return (prefixes[corpus] + person if has_prefixes else person) in seen

    scored = table.take(rows)
    speakers = scored["speaker"].to_pylist()
    has_corpora = "corpus" in scored.column_names
    corpora = scored["corpus"].to_pylist() if has_corpora else [""] * len(speakers)
    pairs = set(zip(speakers, corpora, strict=True))
    return tuple(sorted({speaker for speaker, corpus in pairs if is_seen(speaker, corpus)}))


def _require_same_features(card: CheckpointCard, shards: ShardSet) -> None:
    if card.features != shards.card.features:
        raise CheckpointError(
            f"{shards.uri}: these shards hold other features than those the model was trained on; "
            "prepare them with the model's settings, which are in its card.json under `features`"
        )
    encoder = shards.card.encoder_of(card.config.feature)
    if encoder is not None and card.encoder is not None and encoder.weights != card.encoder.weights:
        raise CheckpointError(
            f"{shards.uri}: its column {encoder.name} comes from weights with the hash "
            f"{encoder.weights[:16]}, but the model was trained with {card.encoder.weights[:16]}; "
            "prepare shards in another folder with the model's encoder"
        )
    require_known_labels(card, shards.card.labels, shards.uri)


def require_known_labels(card: CheckpointCard, labels: Iterable[str], where: str) -> None:
    """Check that a model knows all labels of a corpus.

    Raises:
        CheckpointError: the model does not know a label.
    """
    if unknown := sorted(set(labels) - set(card.labels)):
        raise CheckpointError(
            f"{where}: the model does not know the labels {', '.join(unknown)}; it knows "
            f"{', '.join(card.labels)}. Leave out clips with unknown labels by --label-map common, "
            "or map the labels by a CSV file"
        )


def _score(
    checkpoint: Path, card: CheckpointCard, shards: ShardSet, table: pa.Table, rows: np.ndarray
) -> np.ndarray:
    """Compute the probabilities [clips, labels] of some rows of a shard set."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clips = load_clips(
        shards, card.config.feature, table, rows, card.normalisation, device, card.labels
    )
    network = to_channels_last(read_network(checkpoint, card), device)
    return predict_clips(network, clips, np.arange(len(rows)), card.config, len(card.labels))
