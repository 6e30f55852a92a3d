"""Describes a model for the demo page: its name, its test score, and some of its test clips."""

import html
from contextlib import suppress
from pathlib import Path

from ser_ray.errors import SerRayError, TrackingError
from ser_ray.evaluation.evaluate import origin_of, shards_of
from ser_ray.shards.corpora import open_corpora
from ser_ray.tracking.registry import read_test_scores
from ser_ray.training.checkpoint import SELECTED, read_card
from ser_ray.training.checkpoint_card import CheckpointCard
from ser_ray.training.parts import select_rows


def introduce(checkpoint: Path, name: str) -> tuple[str, list[tuple[str, str]]]:
    """Return a text about a model as Markdown, and the local path and true label of example clips.

    Args:
        name: name that the user gave for the model. If the checkpoint is in a run folder, the name
            of the run is shown instead.
    """
    card, origin = read_card(checkpoint), origin_of(checkpoint)
    name = checkpoint.parent.name if checkpoint.name == SELECTED else name
    score = _score(card, origin.get("run_id", ""), origin.get("tracking_uri", ""))
    about = (
        f"**{name}**: {card.network} on {card.config.feature} of {card.trained_on}, "
        f"{card.split['label']}. {score} The model predicts one of "
        f"{html.escape(', '.join(card.labels))}. It says which acted emotion a voice resembles, "
        "not what a person feels. Recordings stay on the machine that serves this page, and are "
        "deleted when its server stops."
    )
    return about, _examples(checkpoint, card)


def _score(card: CheckpointCard, run_id: str, tracking_uri: str) -> str:
    """Return a sentence about the model's score on its test part."""
    if not card.split["test_speakers"]:
        return "It was trained on all speakers of its corpus, so it has no test score."
    scores = None
    with suppress(TrackingError):
        scores = read_test_scores(run_id, tracking_uri) if run_id else None
    if scores is None:
        return "Its test score is not known; ser-ray evaluate measures it."
    if card.split["speaker_dependent"]:
        clips = "other clips of the voices that it was trained on"
    else:
        clips = "clips of voices that it was not trained on"
    return (
        f"On {scores['clips']} {clips}, its UA (mean recall of the emotions) is "
        f"{scores['ua']:.1%}; guessing would reach {1 / len(card.labels):.1%}."
    )


def _examples(checkpoint: Path, card: CheckpointCard) -> list[tuple[str, str]]:
    """Find a test clip of each emotion that is a complete file on this machine: (path, label)."""
    try:
        clips = open_corpora(shards_of(checkpoint, ()), known=card.corpora).clips()
        test = clips.take(select_rows(clips, card.config).test)
    except SerRayError:
        return []
    path_by_label: dict[str, str] = {}
    for clip in test.select(["path", "emotion", "start", "end"]).to_pylist():
        is_complete = clip["start"] is None and clip["end"] is None
        if is_complete and clip["emotion"] not in path_by_label and Path(clip["path"]).is_file():
            path_by_label[clip["emotion"]] = clip["path"]
    return [(path_by_label[label], label) for label in card.labels if label in path_by_label]
