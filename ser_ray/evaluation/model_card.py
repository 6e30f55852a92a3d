"""The card of a registered model: what a person should know before using it, in Markdown."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ser_ray.evaluation.rendering import render
from ser_ray.tracking.about import SHARDS_TAG
from ser_ray.tracking.models import fetch_checkpoint
from ser_ray.tracking.registry import (
    best_training_of,
    read_test_scores,
    read_validation_ua,
    register_model,
)
from ser_ray.training.checkpoint import CheckpointCard, read_card


def register(run_id: str, name: str, alias: str, tracking_uri: str) -> tuple[str, str]:
    """Register a run's model, and return the new version's number and the model's card.

    For a cross-validation, this is the model of the best fold. The trials of a search have no
    models, so for a search it is that of the newest run that trained the best trial's recipe.

    Raises:
        TrackingError: there is no such run, or it has no model.
    """
    run_id = best_training_of(run_id, tracking_uri)
    with TemporaryDirectory() as folder:
        card = read_card(fetch_checkpoint(run_id, tracking_uri, Path(folder)))
    scores = read_test_scores(run_id, tracking_uri)
    validation_ua = read_validation_ua(run_id, tracking_uri)
    text = model_card(card, scores, validation_ua)
    tags = {
        "protocol": card.split["label"],
        "feature": card.config.feature,
        "corpus": card.corpus,
        SHARDS_TAG: card.shards_fingerprint,
        "val/ua": f"{validation_ua:.4f}",
    }
    if scores is not None:
        tags["test/ua"] = f"{scores['ua']:.4f}"
    return register_model(run_id, tracking_uri, name, alias, tags, text), text


def model_card(card: CheckpointCard, scores: Mapping[str, Any] | None, validation_ua: float) -> str:
    """Write a model's card as Markdown.

    Args:
        card: card of the model's checkpoint.
        scores: scores of the test part, as `Evaluation.to_dict` returns them; None if the test part
            was not evaluated.
        validation_ua: UA on the validation part, from 0 to 1.
    """
    return render(
        "model_card.md.jinja", card=card, scores=scores, validation_ua=validation_ua
    ).rstrip()
