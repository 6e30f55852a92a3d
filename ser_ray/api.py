"""ser_ray from Python: the steps of the command line, with the same settings and defaults.

    import ser_ray

    ser_ray.prepare(ser_ray.PrepareConfig(corpus="RAVDESS"))
    result = ser_ray.train()
    print(ser_ray.evaluate(result.checkpoint))
    print(ser_ray.load_model(result.checkpoint).predict("clip.wav"))

In every function, `address` is the Ray cluster to join: by default the one of RAY_ADDRESS, else one
that is started on this machine. `tracking_uri` is the MLflow store in which a run or a registered
model is looked up. The verbs of `ser_ray.cli` call these functions. A function imports what it
needs when it is called, so that a quick answer does not wait for libraries that it does not use.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import TYPE_CHECKING, Literal

from ser_ray.corpus.download import DownloadConfig
from ser_ray.corpus.words import MISSING_WORDS
from ser_ray.distributed.run_config import RunConfig
from ser_ray.errors import TrackingError
from ser_ray.features.config import Condition
from ser_ray.progress import stderr_console
from ser_ray.search.space import CrossvalConfig, SlotConfig, TuneConfig
from ser_ray.shards.config import PrepareConfig
from ser_ray.training.config import LrRangeConfig, TrainConfig

if TYPE_CHECKING:
    from pathlib import Path

    from ser_ray.corpus.audio_files import AudioFiles
    from ser_ray.distributed.launch import TrainResult
    from ser_ray.distributed.range_test import RangeResult
    from ser_ray.evaluation.evaluation import Evaluation
    from ser_ray.evaluation.statistics import Comparison
    from ser_ray.inference.batch import BatchSummary
    from ser_ray.inference.export import ExportResult
    from ser_ray.inference.predictor import Predictor
    from ser_ray.search.crossval import CrossvalResult
    from ser_ray.search.tuner import TuneResult
    from ser_ray.shards.prepare import PrepareSummary
    from ser_ray.shards.read import ShardSet

OUT = "ser-ray-out"
"""Folder in the current directory for every output whose place the user does not name."""
SHARDS = f"{OUT}/shards"
SYNTHETIC_SHARDS = f"{OUT}/synthetic-shards"
"""Where `pipeline` puts the shards of the synthetic corpus."""

Shards = str | Sequence[str]
"""Folder or URI of a shard set, or of several, which are then read as one."""
PREDICTIONS = f"{OUT}/predictions.parquet"

logger = logging.getLogger(__name__)


def download(config: DownloadConfig = DownloadConfig()) -> "tuple[Path, ...]":
    """Fetch and unpack RAVDESS from its Zenodo record; complete files are not requested again.

    Returns:
        The folders of the corpus.

    Raises:
        ResourcesError: the target is a folder that Ray deletes after the job.
        CorpusError: an archive cannot be fetched or is damaged.
    """
    from ser_ray.cluster import require_kept
    from ser_ray.corpus.download import download as run

    require_kept(config.target)
    return run(config)


def prepare(config: PrepareConfig, *, address: str = "") -> "PrepareSummary":
    """Decode a corpus into Parquet shards of features; call it again to resume or to update them.

    Raises:
        CorpusError, ShardsError, ConfigError, ResourcesError: each names the item and the way out.
    """
    from ser_ray.shards.prepare import prepare as run

    return run(config, address=address)


def open_shards(location: "Path | Shards", label_map: str = "") -> "ShardSet":
    """Open a shard set that `prepare` completed, or several as one.

    Args:
        location: folder or URI of the set, or a sequence of several.
        label_map: which labels are one, as in `TrainConfig`.

    Raises:
        ShardsError: no complete shard set is there.
        ConfigError: the sets do not go together, or the label map does not fit them.
    """
    from ser_ray.shards.corpora import open_corpora

    locations = str(location) if isinstance(location, os.PathLike) else location
    return open_corpora(locations, label_map)


def train(
    shards: Shards = SHARDS,
    recipe: TrainConfig = TrainConfig(),
    run_config: RunConfig = RunConfig(),
    *,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    address: str = "",
) -> "TrainResult":
    """Train one fold; the same call resumes an interrupted training.

    Args:
        shards: folder or URI of the shard set, or of several that are trained on together.
        recipe: what is trained and how.
        run_config: workers, devices, names and places.
        on_epoch: called with the numbers of each epoch, perhaps in another thread; if None they are
            printed on standard error.

    Raises:
        ShardsError, ConfigError, CheckpointError, ResourcesError, TrackingError: before any worker
            starts, where that can be known.
        SerRayError: the training failed; the message gives the reason.
    """
    from ser_ray.distributed.epoch_table import EpochTable
    from ser_ray.distributed.launch import train as run

    if on_epoch is not None:
        return run(shards, recipe, run_config, on_epoch=on_epoch, address=address)
    with EpochTable(stderr_console(), recipe.epochs) as show:
        return run(shards, recipe, run_config, on_epoch=show, address=address)


def recipe_like(run_id: str, tracking_uri: str = "") -> TrainConfig:
    """Read a recipe from the MLflow run of a training, of a trial or fold, or of a whole study.

    The recipe of a search is that of its best trial. That of a cross-validation has the folds' mean
    temperature, for a model of the protocol all.

    Raises:
        TrackingError: there is no such run, or it holds no recipe.
    """
    from ser_ray.tracking.registry import recipe_of_run

    return TrainConfig.from_dict(recipe_of_run(run_id, tracking_uri))


def lr_range(
    shards: Shards = SHARDS,
    recipe: TrainConfig = TrainConfig(),
    run_config: RunConfig = RunConfig(),
    test: LrRangeConfig = LrRangeConfig(),
    *,
    address: str = "",
) -> "RangeResult":
    """Propose both bounds of a recipe's learning rate by a range test (Smith 2015).

    Raises:
        DivergedError: the loss did not fall at any learning rate.
    """
    from ser_ray.distributed.range_test import find_range

    return find_range(shards, recipe, run_config, test, address=address)


def tune(
    shards: Shards = SHARDS,
    recipe: TrainConfig = TrainConfig(),
    run_config: RunConfig = RunConfig(),
    search: TuneConfig = TuneConfig(),
    slots: SlotConfig = SlotConfig(),
    *,
    address: str = "",
) -> "TuneResult":
    """Search for the best recipe on a fold's validation clips; the same call resumes a search.

    Args:
        shards: folder or URI of the shard set, or of several that are trained on together.
        recipe: values of the fields that are not searched; also the first trial.
        run_config: devices, names and places of all trials.
        search: space, searcher and scheduler.
        slots: CPUs and GPUs of a trial.

    Raises:
        SerRayError: no trial succeeded; the message gives the first reason.
    """
    from ser_ray.corpus.folds import CROSS_CORPUS, DEPENDENCE
    from ser_ray.search.trial_table import TrialTable
    from ser_ray.search.tune_run import num_trials
    from ser_ray.search.tuner import search as run

    # Whether corpora share speakers is known only when their clips have been read.
    label = "" if recipe.protocol == CROSS_CORPUS else DEPENDENCE[recipe.protocol == "random"]
    with TrialTable(stderr_console(), num_trials(recipe, search), label) as table:
        return run(shards, recipe, run_config, search, slots, show=table, address=address)


def refit(
    result: "TuneResult",
    shards: Shards = SHARDS,
    run_config: RunConfig = RunConfig(),
    *,
    address: str = "",
) -> "TrainResult":
    """Train the best recipe of a search again, so that its model is kept."""
    from ser_ray.tracking.registry import name_like

    run_config = replace(run_config, name=name_like(result.best.run_id))
    return train(shards, result.best.recipe, run_config, address=address)


def crossval(
    shards: Shards = SHARDS,
    recipe: TrainConfig = TrainConfig(),
    run_config: RunConfig = RunConfig(),
    config: CrossvalConfig = CrossvalConfig(),
    slots: SlotConfig = SlotConfig(),
    *,
    address: str = "",
) -> "CrossvalResult":
    """Train and score every fold of the recipe's protocol; the same call resumes it.

    Args:
        shards: folder or URI of the shard set, or of several that are trained on together.
        recipe: what is trained in every fold.
        run_config: devices, names and places of all trainings.
        config: seeds, folds and which part is scored.
        slots: CPUs and GPUs of one training.
    """
    from ser_ray.search.crossval import crossval as run
    from ser_ray.search.crossval import plan_crossval
    from ser_ray.search.trial_table import TrialTable

    plan = plan_crossval(shards, recipe, config)
    with TrialTable(stderr_console(), len(plan.points), plan.label, compared=False) as table:
        return run(plan, run_config, slots, show=table, address=address)


def load_model(
    model: "str | Path", tracking_uri: str = "", *, min_confidence: float = 0.0
) -> "Predictor":
    """Load a model that names the emotion in audio files.

    Args:
        model: folder or URI of a checkpoint or of a finished run, a run's name or id,
            `runs:/ID/model`, or `models:/NAME@ALIAS`.
        min_confidence: a recording whose most probable emotion has a lower probability than this
            is `unsure`: it gets its probabilities, but no emotion.

    Raises:
        CheckpointError: no checkpoint is there.
        TrackingError: there is no such run or registered model.
    """
    from ser_ray.inference.predictor import Predictor
    from ser_ray.tracking.registry import local_model

    with local_model(model, tracking_uri) as checkpoint:
        return Predictor(checkpoint, min_confidence)


def predict_to_table(
    files: "Sequence[str | Path] | AudioFiles",
    model: "str | Path | Predictor",
    output: str = PREDICTIONS,
    *,
    tracking_uri: str = "",
    address: str = "",
) -> "BatchSummary":
    """Name the emotion in many files on a cluster; the same call resumes an interrupted pass.

    Args:
        files: files, folders, URIs or patterns like `clips/**/*.wav`, or what `list_audio` found.
        model: as `load_model` takes it, or a loaded model.
        output: table to write, one row for each file: .parquet, .csv or .jsonl.

    Raises:
        CorpusError: there are no such files.
        ConfigError, ResourcesError: the output cannot be written, or the cluster cannot see a file.
        SerRayError: the pass ended early; the answers so far are kept.
    """
    from ser_ray.cluster import cluster
    from ser_ray.corpus.audio_files import AudioFiles, list_audio
    from ser_ray.inference.batch import predict_many
    from ser_ray.inference.predictor import Predictor
    from ser_ray.inference.results import output_suffix

    found = files if isinstance(files, AudioFiles) else list_audio([str(file) for file in files])
    output_suffix(output)
    predictor = model if isinstance(model, Predictor) else load_model(model, tracking_uri)
    with cluster(address):
        return predict_many(found.files, predictor, output, problems=found.problems)


def export(
    model: "str | Path",
    output: str = "",
    format: Literal["onnx", "torch"] = "onnx",
    *,
    tracking_uri: str = "",
) -> "ExportResult":
    """Write a model as one file: waveform at its sample rate in, probabilities out.

    Args:
        model: as `load_model` takes it.
        output: file to write; `ser-ray-out/model.onnx` or `.pt2` if empty.
        format: ONNX, or torch's exported program.

    Raises:
        CheckpointError, TrackingError: no such model.
        SerRayError: a package is missing, or the file's answers differ from the model's.
    """
    from ser_ray.inference.export import export as run
    from ser_ray.tracking.registry import local_model

    output = output or f"{OUT}/model.{'onnx' if format == 'onnx' else 'pt2'}"
    with local_model(model, tracking_uri) as checkpoint:
        return run(checkpoint, output, format)


def register(
    run_id: str, name: str = "ser-ray", alias: str = "champion", *, tracking_uri: str = ""
) -> tuple[str, str]:
    """Make a run's model a registered version, described by its model card.

    Args:
        run_id: MLflow run of a training, of a search or of a cross-validation.
        name: the registered model.
        alias: alias that the version gets; `models:/NAME@ALIAS` then names it.

    Returns:
        The version's number and the model card as Markdown.

    Raises:
        TrackingError: there is no such run, it has no model, or the store refuses the version.
    """
    from ser_ray.evaluation.to_mlflow import register as run

    return run(run_id, name, alias, tracking_uri)


def prepare_for(
    model: "str | Path",
    corpus: str,
    shards: str,
    *,
    missing: tuple[str, ...] = MISSING_WORDS,
    columns: tuple[str, ...] = (),
    tracking_uri: str = "",
    address: str = "",
) -> "PrepareSummary":
    """Prepare a corpus with the features that a model was trained on.

    Args:
        model: as `load_model` takes it.
        corpus: folder, URI or table, as in `PrepareConfig`.
        shards: folder or URI that the shards are written to.
        missing: words in a table that mean a missing value.
        columns: which columns of a table are which, as in `PrepareConfig`.

    Raises:
        CheckpointError, TrackingError: no such model.
        CorpusError, ShardsError, ConfigError, ResourcesError: as `prepare`.
    """
    from ser_ray.tracking.registry import local_model
    from ser_ray.training.checkpoint import ENCODER, read_card

    with local_model(model, tracking_uri) as checkpoint:
        card = read_card(checkpoint)
        own, name = checkpoint / ENCODER, card.config.feature
        encoder = f"{name}={own if own.exists() else card.encoder_file}"
        config = PrepareConfig(
            corpus=corpus,
            shards=shards,
            missing=missing,
            columns=columns,
            features=card.features,
            encoder=(encoder,) if card.encoder else (),
        )
        return prepare(config, address=address)


def evaluate(
    model: "str | Path",
    shards: Shards = "",
    *,
    label_map: str = "",
    protocol: str = "",
    fold: int | None = None,
    allow_seen_speakers: bool = False,
    under: Sequence[Condition] = (),
    audio: bool = True,
    tracking_uri: str = "",
    address: str = "",
) -> "Evaluation":
    """Score a model, by default on the test part of its own fold, and record that in its run.

    The scores of other clips go to a page of their own, in `ser-ray-out/evaluations`.

    Args:
        model: as `load_model` takes it.
        shards: the shard sets that it was trained on, or others of speakers that it was not trained
            on. If empty, the former are looked for.
        label_map: which labels are one, as in `TrainConfig`, and how the model writes them.
        protocol: score the test part of a fold of this protocol instead.
        fold: number of the fold to score instead of the model's own, counted from 0.
        allow_seen_speakers: also score speakers that the model was trained on.
        under: also score the clips under these groups of recording conditions, which
            `ser_ray.features.conditions` defines. Their files are decoded again.
        audio: put the sound of the clips that the report shows into the report.

    Raises:
        CorpusError: with `under`, a clip's file cannot be read again.
        CheckpointError, ShardsError, ConfigError: the model, the shards or their features do not
            fit, or the model was trained on the speakers.
    """
    from ser_ray.evaluation.evaluate import evaluate as run
    from ser_ray.evaluation.evaluate import shards_of
    from ser_ray.evaluation.pages import evaluation_page
    from ser_ray.evaluation.rendering import store_page
    from ser_ray.evaluation.to_mlflow import record_evaluation
    from ser_ray.tracking.registry import local_model

    with local_model(model, tracking_uri) as checkpoint:
        shards = shards or shards_of(checkpoint, (SHARDS, SYNTHETIC_SHARDS))
        evaluation = run(
            checkpoint,
            shards,
            label_map=label_map,
            protocol=protocol,
            fold=fold,
            allow_seen_speakers=allow_seen_speakers,
        )
        if under:
            from ser_ray.cluster import cluster
            from ser_ray.evaluation.robustness import predict_conditions, score_under
            from ser_ray.inference.predictor import Predictor

            with cluster(address):
                predicted = predict_conditions(evaluation, Predictor(checkpoint), under)
            evaluation = replace(evaluation, under=score_under(evaluation, predicted))
    if evaluation.origin and evaluation.is_own_test:
        try:
            record_evaluation(evaluation, audio=audio)
        except TrackingError as error:
            logger.warning("the training's run does not have these scores yet: %s", error)
    if not evaluation.report:
        digest = sha256(f"{model} {shards} {protocol} {fold}".encode()).hexdigest()[:8]
        evaluation = replace(evaluation, report=f"{OUT}/evaluations/{digest}.html")
        page = evaluation_page(evaluation, model=str(model), audio=audio)
        store_page(page, evaluation.report)
    return evaluation


def compare(first: "Evaluation", second: "Evaluation") -> "Comparison":
    """Compare two models that were scored on the same clips, by paired tests.

    Raises:
        ConfigError: they were scored on different clips, or know different labels.
    """
    from ser_ray.evaluation.evaluate import compare as run

    return run(first, second)
