"""What the verbs of the command line do: call the rooms in order and say where the results are."""

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ser_ray.cli import verbs as cli
from ser_ray.cluster import cluster, require_kept
from ser_ray.errors import SerRayError, TrackingError
from ser_ray.shards.config import PrepareConfig
from ser_ray.training.config import TrainConfig

SHOWN_PREDICTIONS = 8
FEW_FILES = 48
"""More are predicted by a pass of Ray Data, which takes some ten seconds to start."""

NOTHING_SCORED = "none of these files could be scored"

logger = logging.getLogger(__name__)
console = Console(stderr=True, highlight=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A verb's result: for a program and for a person."""

    data: dict[str, Any]
    text: str
    problem: str = ""
    """Why this is a failure all the same."""


def run(verb: cli.Common) -> None:
    """Run a parsed verb and print its result.

    Raises:
        SerRayError: it failed, perhaps with a result.
    """
    outcome = _DO[type(verb)](verb)
    print(json.dumps(outcome.data, indent=2) if verb.json else outcome.text)
    if outcome.problem:
        raise SerRayError(outcome.problem)


def download(verb: cli.Download) -> Outcome:
    """Zenodo's record to folders of clips."""
    from ser_ray.corpus.download import download as run_download

    require_kept(verb.download.target)
    folders = run_download(verb.download)
    lines = [f"{folder} is complete" for folder in folders]
    lines.append(f"prepare it with ser-ray prepare --corpus {verb.download.target} --shards FOLDER")
    return Outcome({"folders": [str(folder) for folder in folders]}, "\n".join(lines))


def prepare(verb: cli.Prepare) -> Outcome:
    """Corpus to shards."""
    from ser_ray.corpus.census import compare_with_ravdess
    from ser_ray.shards.prepare import prepare as run_prepare
    from ser_ray.shards.read import open_shards

    summary = run_prepare(verb.prepare, address=verb.address)
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
    from ser_ray.distributed.display import EpochPrinter
    from ser_ray.distributed.launch import train as run_train
    from ser_ray.tracking.tracker import ui_command

    with EpochPrinter(console, verb.recipe.epochs) as show:
        result = run_train(verb.shards, verb.recipe, verb.run, on_epoch=show, address=verb.address)
    selected = result.selected
    data = {
        "name": result.name,
        "checkpoint": result.checkpoint,
        "run_id": result.run_id,
        "tracking_uri": result.tracking_uri,
        "protocol": result.card.split["label"],
        "corpus": result.card.corpus,
        "selected": selected,
        "history": result.history,
    }
    text = "\n".join(
        (
            f"trained on   {result.card.trained_on}, {result.card.split['label']}",
            f"validation   UA {selected['val_ua']:.1%}, WA {selected['val_wa']:.1%} in epoch "
            f"{selected['epoch']:.0f}, the {verb.recipe.keep} of {len(result.history)}",
            f"checkpoint   {result.checkpoint}",
            f"MLflow run   {result.run_id}",
            f"MLflow UI    {ui_command(result.tracking_uri)}",
        )
    )
    return Outcome(data, text)


def lr_range(verb: cli.LrRange) -> Outcome:
    """Shards and a recipe to the bounds of its learning rate."""
    from ser_ray.distributed.lr_range import find_range
    from ser_ray.tracking.tracker import ui_command

    result = find_range(verb.shards, verb.recipe, verb.run, verb.test, address=verb.address)
    found = result.found
    bounds = f"--lr-min {found.lr_min:.1e} --lr-max {found.lr_max:.1e}"
    lines = [
        f"range test   {result.label}: {len(found.learning_rates)} steps, "
        f"{found.learning_rates[0]:.0e} to {found.learning_rates[-1]:.0e}",
        f"MLflow run   {result.run_id}",
        f"MLflow UI    {ui_command(result.tracking_uri)}",
        f"train with   ser-ray train --shards {verb.shards} {bounds}",
    ]
    data = asdict(found) | {"run_id": result.run_id, "tracking_uri": result.tracking_uri}
    return Outcome(data, "\n".join(lines))


def tune(verb: cli.Tune) -> Outcome:
    """A search over recipes; `--refit` trains the best one as `train --like` does."""
    from ser_ray.corpus.splits import dependence_of
    from ser_ray.search.display import TrialTable
    from ser_ray.search.tuner import num_trials, search
    from ser_ray.tracking.tracker import name_like, ui_command

    total = num_trials(verb.recipe, verb.search)
    with TrialTable(console, total, dependence_of(verb.recipe.protocol)) as table:
        result = search(
            verb.shards,
            verb.recipe,
            verb.run,
            verb.search,
            verb.slots,
            show=table,
            address=verb.address,
        )
    best, recipe = result.best, result.best.recipe
    states = [trial.state for trial in result.trials]
    counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    lines = [
        f"searched     {len(result.trials)} trials: {counted}",
        f"best         trial {best.number}: UA {best.selected['val_ua']:.1%}, WA "
        f"{best.selected['val_wa']:.1%} in epoch {best.selected['epoch']:.0f} ({result.label})",
        f"             {recipe.feature}, lr_min {recipe.lr_min:.2e}, lr_max {recipe.lr_max:.2e}",
        f"kept in      {result.best_recipe}",
        f"MLflow run   {result.run_id}",
        f"MLflow UI    {ui_command(result.tracking_uri)}",
        f"train it     {result.again}",
    ]
    data = {
        "name": result.name,
        "run_id": result.run_id,
        "tracking_uri": result.tracking_uri,
        "protocol": result.label,
        "states": {state: states.count(state) for state in dict.fromkeys(states)},
        "best": {"run_id": best.run_id, "selected": best.selected, "recipe": recipe.to_dict()},
    }
    if verb.search.refit:
        fitted = train(
            cli.Train(
                shards=verb.shards,
                recipe=recipe,
                run=replace(verb.run, name=name_like(best.run_id)),
                address=verb.address,
            )
        )
        lines[-1] = fitted.text
        data["refit"] = fitted.data
    return Outcome(data, "\n".join(lines))


def crossval(verb: cli.Crossval) -> Outcome:
    """Every fold trained and tested, to one set of figures."""
    from ser_ray.search.crossval import crossval as run_crossval
    from ser_ray.search.crossval import plan_crossval
    from ser_ray.search.display import TrialTable
    from ser_ray.tracking.tracker import ui_command

    plan = plan_crossval(verb.shards, verb.recipe, verb.crossval)
    with TrialTable(console, plan.num_trials, plan.label) as table:
        result = run_crossval(plan, verb.run, verb.slots, show=table, address=verb.address)
    lines = [
        result.text(),
        f"predictions  {result.table}",
        f"MLflow run   {result.run_id}",
        f"MLflow UI    {ui_command(result.tracking_uri)}",
    ]
    return Outcome(
        {"name": result.name, "run_id": result.run_id, **result.to_dict()}, "\n".join(lines)
    )


def evaluate(verb: cli.Evaluate) -> Outcome:
    """Checkpoint to scores, recorded in the run that trained it, and to a comparison."""
    from ser_ray.evaluation.evaluate import Evaluation, compare, origin_of
    from ser_ray.evaluation.evaluate import evaluate as run_evaluate
    from ser_ray.evaluation.run_page import record_evaluation
    from ser_ray.tracking.registry import local_checkpoint
    from ser_ray.tracking.tracker import Tracker
    from ser_ray.training.checkpoint import read_card

    if verb.corpus:
        with local_checkpoint(verb.model, verb.tracking_uri) as checkpoint:
            features = read_card(checkpoint).features
        config = PrepareConfig(corpus=verb.corpus, shards=verb.shards, features=features)
        console.print(prepare(cli.Prepare(prepare=config, address=verb.address)).text)

    def score(model: str) -> tuple[Evaluation, dict[str, str]]:
        with local_checkpoint(model, verb.tracking_uri) as checkpoint:
            evaluation = run_evaluate(
                checkpoint,
                verb.shards,
                protocol=verb.protocol,
                fold=verb.fold,
                allow_seen_speakers=verb.allow_seen_speakers,
            )
            return evaluation, dict(origin_of(checkpoint))

    evaluation, origin = score(verb.model)
    data, text = evaluation.to_dict() | origin, str(evaluation)
    if verb.against:
        comparison = compare(evaluation, score(verb.against)[0])
        data["comparison"] = asdict(comparison)
        text += f"\nagainst {verb.against}: {comparison}"
    if origin and evaluation.is_own_test:
        try:
            tracker = Tracker.of_run(origin["tracking_uri"], origin["run_id"])
            record_evaluation(evaluation, tracker, audio=verb.audio)
        except TrackingError as error:
            logger.warning("the training's run has not got these scores: %s", error)
    return Outcome(data, text)


def predict(verb: cli.Predict) -> Outcome:
    """Files to emotions: few at once, many through Ray into a table."""
    from ser_ray.inference.predictor import Predictor, format_predictions
    from ser_ray.inference.recordings import list_audio
    from ser_ray.tracking.registry import local_checkpoint

    files = list_audio(verb.files)
    with local_checkpoint(verb.model, verb.tracking_uri) as checkpoint:
        predictor = Predictor(checkpoint)
    if verb.output or len(files) > FEW_FILES:
        return _predict_many(files, predictor, verb)
    found = [predictor.predict(file) for file in files]
    text = format_predictions(found)
    if predictor.card.corpus == "synthetic":
        text += "\n(the model was trained on the synthetic corpus)"
    problem = NOTHING_SCORED if all(item.status != "ok" for item in found) else ""
    return Outcome({"predictions": [asdict(item) for item in found]}, text, problem)


def _predict_many(files: list[str], predictor: Any, verb: cli.Predict) -> Outcome:
    from ser_ray.inference.batch import predict_many
    from ser_ray.inference.recordings import UNREACHABLE
    from ser_ray.inference.results import output_suffix

    output = verb.output or f"{cli.OUT}/predictions.parquet"
    output_suffix(output)
    with cluster(verb.address):
        summary = predict_many(files, predictor, output)
    counts = ", ".join(f"{count} {status}" for status, count in summary.counts.items())
    emotions = ", ".join(f"{count} {emotion}" for emotion, count in summary.emotions.items())
    before = f", {summary.files_before} of them before" if summary.files_before else ""
    lines = [
        f"{len(files)} files: {counts}",
        emotions,
        f"in {summary.seconds:.1f} s{before}: {output}",
    ]
    problem = "" if "ok" in summary.counts else NOTHING_SCORED
    if missing := summary.counts.get(UNREACHABLE):
        problem = f"{missing} files were out of reach: the same command asks for them again"
    return Outcome(asdict(summary), "\n".join(line for line in lines if line), problem)


def demo_ui(verb: cli.DemoUi) -> Outcome:
    """Checkpoint to a page, until Ctrl-C."""
    from ser_ray.inference.demo import serve
    from ser_ray.inference.predictor import Predictor
    from ser_ray.tracking.registry import local_checkpoint

    with local_checkpoint(verb.model, verb.tracking_uri) as checkpoint:
        predictor = Predictor(checkpoint)
    serve(predictor, verb.host, verb.port, lambda url: console.print(f"{url} (Ctrl-C stops it)"))
    return Outcome({"stopped": True}, "stopped")


def export(verb: cli.Export) -> Outcome:
    """Checkpoint to one file with the features inside."""
    from ser_ray.inference.export import export as run_export
    from ser_ray.tracking.registry import local_checkpoint

    output = verb.output or f"{cli.OUT}/model.{'onnx' if verb.format == 'onnx' else 'pt2'}"
    with local_checkpoint(verb.model, verb.tracking_uri) as checkpoint:
        exported = run_export(checkpoint, output, verb.format)
    return Outcome(asdict(exported), str(exported))


def register(verb: cli.Register) -> Outcome:
    """Run to a registered model version with its card."""
    from ser_ray.evaluation.model_card import register as run_register

    version, card = run_register(verb.run_id, verb.name, verb.alias, verb.tracking_uri)
    data = {"name": verb.name, "version": version, "alias": verb.alias}
    name = f"models:/{verb.name}@{verb.alias}" if verb.alias else f"models:/{verb.name}/{version}"
    return Outcome(data, f"{card}\nregistered   {name} (version {version})")


def pipeline(verb: cli.Pipeline) -> Outcome:
    """The four steps, one after the other, on one cluster."""
    from ser_ray.corpus.ravdess import EMOTIONS
    from ser_ray.corpus.synthetic import make_synthetic_corpus
    from ser_ray.training.model import read_pretrained

    corpus, shards, recipe = verb.corpus, verb.shards, verb.recipe
    read_pretrained(recipe.weights, len(EMOTIONS))  # what is not there is said before hours pass
    if corpus == cli.SYNTHETIC:
        console.print(f"no --corpus: making the synthetic corpus in {corpus}")
        make_synthetic_corpus(Path(corpus))
    steps: dict[str, Outcome] = {}
    with cluster(verb.address):
        steps["prepare"] = prepare(
            cli.Prepare(prepare=PrepareConfig(corpus=corpus, shards=shards, features=verb.features))
        )
        console.print(steps["prepare"].text)
        steps["train"] = train(cli.Train(shards=shards, recipe=recipe, run=verb.run))
        model = steps["train"].data["checkpoint"]
        steps["evaluate"] = evaluate(cli.Evaluate(model=model, shards=shards, audio=verb.run.audio))
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


def _test_files(shards: str, recipe: TrainConfig) -> tuple[str, ...]:
    """A few of the fold's test clips, spread over it."""
    from ser_ray.shards.read import open_shards
    from ser_ray.training.data import select_rows

    clips = open_shards(shards).clips()
    rows = select_rows(clips, recipe).test
    selected = rows[:: max(len(rows) // SHOWN_PREDICTIONS, 1)][:SHOWN_PREDICTIONS]
    return tuple(clips["path"].take(selected).to_pylist())


_DO: dict[type[cli.Common], Any] = {
    cli.Download: download,
    cli.Prepare: prepare,
    cli.Train: train,
    cli.LrRange: lr_range,
    cli.Tune: tune,
    cli.Crossval: crossval,
    cli.Evaluate: evaluate,
    cli.Predict: predict,
    cli.DemoUi: demo_ui,
    cli.Export: export,
    cli.Register: register,
    cli.Pipeline: pipeline,
}
