"""What a person must know of a model before using it, in words, from what its run recorded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ser_ray.training.checkpoint import CheckpointCard, read_card

LICENCE = (
    "RAVDESS is licensed CC BY-NC-SA 4.0 by its authors (Livingstone and Russo 2018, "
    "https://doi.org/10.1371/journal.pone.0196391): this model is for non-commercial use."
)
CHOICES = {
    "last": "the last epoch's; folds and trials are selected by it",
    "best": "the best epoch's, selected by it, as folds and trials are",
}
LIMITS = (
    "RAVDESS is 24 professional actors, all speakers of North American English, who act eight "
    "emotions on two sentences in a studio. The model says which of these acted emotions a voice "
    "resembles. It does not say what a person feels, and on spontaneous speech, other languages, "
    "other accents, children, noise or telephone lines nothing is known of its scores. Do not base "
    "decisions about people on it."
)


def register(run_id: str, name: str, alias: str, tracking_uri: str) -> tuple[str, str]:
    """Make a run's model a registered version; returns its number and its card in words.

    Of a cross-validation its best fold's model is taken, of a search that of its best trial trained
    again.

    Raises:
        TrackingError: no such run, or no model in it.
    """
    from ser_ray.tracking.registry import (
        best_training_of,
        fetch_checkpoint,
        read_evaluation,
        register_model,
    )

    run_id = best_training_of(run_id, tracking_uri)
    with TemporaryDirectory() as folder:
        card = read_card(fetch_checkpoint(run_id, tracking_uri, Path(folder)))
    scores, validation_ua = read_evaluation(run_id, tracking_uri)
    text = model_card(card, scores, validation_ua)
    tags = {
        "protocol": card.split["label"],
        "feature": card.config.feature,
        "corpus": card.corpus,
        "shards.fingerprint": card.shards_fingerprint,
        "val_ua": f"{validation_ua:.4f}",
    }
    if scores is not None:
        tags["test_ua"] = f"{scores['ua']:.4f}"
    return register_model(run_id, tracking_uri, name, alias, tags, text), text


def model_card(card: CheckpointCard, scores: Mapping[str, Any] | None, validation_ua: float) -> str:
    """Write a model's card as Markdown.

    Args:
        card: of its checkpoint.
        scores: what `Evaluation.to_dict` gave for its test part, if it was evaluated.
        validation_ua: UA of its validation part, a share.
    """
    parts = [
        f"# Speech emotion recognition, {card.config.feature}",
        f"ResNet18 on {card.config.feature} features of {card.trained_on}, started from "
        f"{card.initial_weights}. It names one of: {', '.join(card.labels)}.",
        "## Data and protocol",
        f"{card.split['label']}: trained on {_people(card, 'train')}, validated on "
        f"{_people(card, 'validation')}, tested on {_people(card, 'test')}. Shards "
        f"{card.shards_fingerprint}.",
        "## Scores",
        f"Validation UA {validation_ua:.1%} ({CHOICES[card.config.keep]}).",
        *(_scores(scores) if scores else ["The test part has not been scored: ser-ray evaluate."]),
        "## Limits",
    ]
    if card.corpus == "synthetic":
        parts.append("Trained on synthesised clips: it shows that the program works, no more.")
    elif card.corpus == "ravdess":
        parts += [LIMITS, "## Licence", LICENCE]
    else:
        parts.append("Trained on an own corpus: what it does not hold, the model has not heard.")
    return "\n\n".join(parts)


def _scores(scores: Mapping[str, Any]) -> list[str]:
    low, high = scores["intervals"]["ua"]
    drawn = f"{scores['intervals']['count']} {scores['intervals']['drawn']}"
    lines = [
        f"Test, {scores['protocol']}, {scores['clips']} clips: UA {scores['ua']:.1%} (95 % "
        f"interval over {drawn} {low:.1%} to {high:.1%}), WA {scores['wa']:.1%}, macro F1 "
        f"{scores['f1']:.1%}, calibration error {scores['ece']:.1%}.",
        _table(("emotion", "recall"), [(k, f"{v:.1%}") for k, v in scores["recall"].items()]),
    ]
    for kind, rows in scores["groups"].items():
        shown = [(row[kind], row["clips"], f"{row['wa']:.1%}", f"{row['ua']:.1%}") for row in rows]
        lines.append(_table((kind, "clips", "WA", "UA"), shown))
    return lines


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def _people(card: CheckpointCard, side: str) -> str:
    speakers = card.split[f"{side}_speakers"]
    return f"{len(speakers)} speakers ({', '.join(speakers)})"
