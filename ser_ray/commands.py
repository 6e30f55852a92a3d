"""What the verbs of the command line do: call the rooms in order and say where the results are."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ser_ray import cli
from ser_ray.cluster import cluster
from ser_ray.errors import SerRayError
from ser_ray.shards.config import PrepareConfig
from ser_ray.training.config import TrainConfig

SHOWN_PREDICTIONS = 8

console = Console(stderr=True, highlight=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A verb's result: for a program and for a person."""

    data: dict[str, Any]
    text: str


def run(verb: cli.Common) -> None:
    """Run a parsed verb and print its result."""
    outcome = _DO[type(verb)](verb)
    print(json.dumps(outcome.data, indent=2) if verb.json else outcome.text)


def prepare(verb: cli.Prepare) -> Outcome:
    """Corpus to shards."""
    from ser_ray.corpus.census import compare_with_ravdess
    from ser_ray.shards.prepare import prepare as run_prepare
    from ser_ray.shards.read import open_shards

    with cluster(verb.address):
        summary = run_prepare(verb.prepare)
    card, lines = summary.card, [str(summary)]
    if card.corpus == "ravdess":
        lines.append(compare_with_ravdess(open_shards(verb.prepare.shards).outcomes()).text())
    data = {
        "shards": verb.prepare.shards,
        "files": card.num_files,
        "clips": card.num_clips,
        "outcomes": card.counts,
        "fingerprint": card.fingerprint,
        "seconds": summary.seconds,
    }
    return Outcome(data, "\n".join(lines))


def train(verb: cli.Train) -> Outcome:
    """Shards to a checkpoint."""
    from ser_ray.tracking import ui_command
    from ser_ray.training.distributed import train as run_train

    result = run_train(
        verb.shards,
        verb.recipe,
        verb.run,
        on_epoch=EpochPrinter(verb.recipe.epochs),
        address=verb.address,
    )
    best = result.best
    data = {
        "name": result.name,
        "checkpoint": result.checkpoint,
        "run_id": result.run_id,
        "tracking_uri": result.tracking_uri,
        "protocol": result.card.split["label"],
        "corpus": result.card.corpus,
        "best": best,
        "history": result.history,
    }
    text = "\n".join(
        (
            f"trained on   {result.card.trained_on}, {result.card.split['label']}",
            f"validation   UA {best['val_ua']:.1%}, WA {best['val_wa']:.1%} in epoch "
            f"{best['epoch']:.0f}, the best of {len(result.history)}",
            f"checkpoint   {result.checkpoint}",
            f"MLflow run   {result.run_id}",
            f"MLflow UI    {ui_command(result.tracking_uri)}",
        )
    )
    return Outcome(data, text)


def evaluate(verb: cli.Evaluate) -> Outcome:
    """Checkpoint to test scores, recorded in the run that trained it."""
    from ser_ray.inference.evaluate import evaluate as run_evaluate
    from ser_ray.inference.evaluate import log_evaluation, origin_of
    from ser_ray.inference.predict import local_checkpoint
    from ser_ray.tracking import Tracker

    with local_checkpoint(verb.model) as checkpoint:
        evaluation = run_evaluate(checkpoint, verb.shards)
        origin = origin_of(checkpoint)
    if origin:
        log_evaluation(evaluation, Tracker(origin["tracking_uri"], origin["run_id"]))
    scores = evaluation.scores
    text = (
        f"{evaluation.label}, {scores.num_clips} clips: "
        f"UA {scores.ua:.1%}, WA {scores.wa:.1%}, macro F1 {scores.macro_f1:.1%}"
    )
    return Outcome(evaluation.to_dict() | dict(origin), text)


def predict(verb: cli.Predict) -> Outcome:
    """Files to emotions."""
    from ser_ray.inference.predict import Predictor, list_audio, local_checkpoint

    files = list_audio(verb.files)
    with local_checkpoint(verb.model) as checkpoint:
        predictor = Predictor(checkpoint)
    found = [predictor.predict(file) for file in files]
    failed = sum(item.status != "ok" for item in found)
    lines = [_prediction_line(item) for item in found]
    if len(found) == 1 and found[0].probabilities:
        lines += _bars(found[0].probabilities)
    if predictor.card.corpus == "stand-in":
        lines.append("(the model was trained on the synthetic stand-in corpus)")
    if failed == len(found):
        raise SerRayError("\n".join(lines))
    return Outcome({"predictions": [asdict(item) for item in found]}, "\n".join(lines))


def pipeline(verb: cli.Pipeline) -> Outcome:
    """The four steps, one after the other, on one cluster."""
    from ser_ray.corpus.names import EMOTIONS
    from ser_ray.corpus.standin import make_standin
    from ser_ray.training.model import read_pretrained

    corpus, shards, recipe = verb.corpus, verb.shards, verb.recipe
    read_pretrained(recipe.weights, len(EMOTIONS))  # what is not there is said before hours pass
    if corpus == cli.STAND_IN:
        console.print(f"no --corpus: making the synthetic stand-in corpus in {corpus}")
        make_standin(Path(corpus))
    steps: dict[str, Outcome] = {}
    with cluster(verb.address):
        steps["prepare"] = prepare(
            cli.Prepare(prepare=PrepareConfig(corpus=corpus, shards=shards, features=verb.features))
        )
        console.print(steps["prepare"].text)
        steps["train"] = train(cli.Train(shards=shards, recipe=recipe, run=verb.run))
        model = steps["train"].data["checkpoint"]
        steps["evaluate"] = evaluate(cli.Evaluate(model=model, shards=shards))
        files = _test_files(shards, recipe)
        steps["predict"] = predict(cli.Predict(files=files, model=model))
    text = "\n".join(
        (
            "",
            steps["predict"].text,
            "",
            f"shards       {shards}",
            steps["train"].text,
            f"test         {steps['evaluate'].text}",
        )
    )
    return Outcome({name: step.data for name, step in steps.items()}, text)


class EpochPrinter:
    """Shows an epoch's row: in place on a terminal, as a line in a log."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def __call__(self, row: dict[str, float]) -> None:
        """Show one epoch."""
        done = int(row["epoch"])
        left = (self.epochs - done) * row["epoch_seconds"]
        console.print(
            f"epoch {done:3d}/{self.epochs}  "
            f"loss {row['train_loss']:.3f}, validation {row['val_loss']:.3f}  "
            f"UA {row['val_ua']:6.1%}  WA {row['val_wa']:6.1%}  lr {row['lr']:.2e}  "
            f"{row['clips_per_second']:5.0f} clips/s  {_clock(left)} left"
        )


def _test_files(shards: str, recipe: TrainConfig) -> tuple[str, ...]:
    """A few of the fold's test clips, spread over it."""
    from ser_ray.shards.read import open_shards
    from ser_ray.training.data import select_rows

    clips = open_shards(shards).clips()
    rows = select_rows(clips, recipe).test
    chosen = rows[:: max(len(rows) // SHOWN_PREDICTIONS, 1)][:SHOWN_PREDICTIONS]
    return tuple(clips["path"].take(chosen).to_pylist())


def _prediction_line(item: Any) -> str:
    name = Path(item.path).name
    if item.probabilities is None:
        return f"{name}: {item.status} ({item.reason})"
    return f"{name}: {item.emotion} ({item.probabilities[item.emotion]:.0%})"


def _bars(probabilities: dict[str, float], width: int = 40) -> list[str]:
    longest = max(len(label) for label in probabilities)
    ranked = sorted(probabilities.items(), key=lambda item: -item[1])
    return [f"  {label:{longest}}  {p:6.1%}  {'█' * round(p * width)}" for label, p in ranked]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


_DO: dict[type[cli.Common], Any] = {
    cli.Prepare: prepare,
    cli.Train: train,
    cli.Evaluate: evaluate,
    cli.Predict: predict,
    cli.Pipeline: pipeline,
}
