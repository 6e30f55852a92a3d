"""ser_ray from Python: the steps of the command line, with the same settings and defaults.

    import ser_ray

    ser_ray.prepare(ser_ray.PrepareConfig(corpus="RAVDESS"))
    result = ser_ray.train()
    print(ser_ray.evaluate(result.checkpoint))
    print(ser_ray.load_model(result.checkpoint).predict("clip.wav"))

`address` is the address of the Ray cluster to join, or `local` to start Ray on this machine. The
default is the variable RAY_ADDRESS; without this variable, the work is done on this machine, and
Ray is started there if the work needs Ray. `tracking_uri` is the MLflow store with the runs and
registered models. The verbs of `ser_ray.cli` call these functions. Every function imports its
libraries when it is called, so that quick functions need not wait for slow libraries.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from ser_ray.corpus.ravdess.download import DownloadConfig
from ser_ray.corpus.words import MISSING_WORDS
from ser_ray.distributed.run_config import RunConfig
from ser_ray.errors import TrackingError
from ser_ray.features.config import Condition
from ser_ray.progress import stderr_console
from ser_ray.search.config import CrossvalConfig, SlotConfig, TuneConfig
from ser_ray.shards.config import PrepareConfig, ShardLocations
from ser_ray.training.recipe import LrRangeConfig, TrainConfig

if TYPE_CHECKING:
    from pathlib import Path

    from ser_ray.corpus.audio_files import AudioFiles
    from ser_ray.distributed.lr_range import LrRangeResult
    from ser_ray.distributed.train import TrainResult
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
"""Default folder for outputs, in the current directory."""
SHARDS = f"{OUT}/shards"
SYNTHETIC_SHARDS = f"{OUT}/synthetic-shards"
"""Default folder for the shards of the synthetic corpus, which `ser-ray pipeline` makes."""
PREDICTIONS = f"{OUT}/predictions.parquet"

logger = logging.getLogger(__name__)


def download(config: DownloadConfig = DownloadConfig()) -> "tuple[Path, ...]":
    """Download RAVDESS from its Zenodo record, and unpack it. Complete files are not fetched again.

    Returns:
        The folders of the corpus.

    Raises:
        ResourcesError: the target is in a folder that Ray deletes after the job.
        CorpusError: an archive cannot be downloaded, or is damaged.
    """
    from ser_ray.cluster.shared_files import require_kept
    from ser_ray.corpus.ravdess.download import download as run

    require_kept(config.target)
    return run(config)


def prepare(config: PrepareConfig, *, address: str = "") -> "PrepareSummary":
    """Decode a corpus into Parquet shards of features. The same call resumes or updates the shards.

    Raises:
        CorpusError, ShardsError, ConfigError, ResourcesError: as `ser_ray.shards.prepare.prepare`.
    """
    from ser_ray.shards.prepare import prepare as run

    return run(config, address=address)


def open_shards(location: ShardLocations, label_map: str = "") -> "ShardSet":
    """Open a shard set that `prepare` completed, or several as one.

    Args:
        location: folder or URI of the set, or a sequence of several.
        label_map: how labels are mapped, as in `TrainConfig`.

    Raises:
        ShardsError: a location has no complete shard set.
        ConfigError: two sets have the same name or different features, or the label map does not
            fit the sets.
    """
    from ser_ray.shards.corpora import open_corpora

    return open_corpora(location, label_map)


def train(
    shards: ShardLocations = SHARDS,
    recipe: TrainConfig = TrainConfig(),
    run_config: RunConfig = RunConfig(),
    *,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    address: str = "",
) -> "TrainResult":
    """Train one fold; the same call resumes an interrupted training.

    Args:
        shards: folder or URI of the shard set, or of several that are trained on together.
        recipe: settings of the training.
        run_config: workers, devices, names and places.
        on_epoch: called with the metrics of each epoch, perhaps in another thread. By default, the
            metrics are printed on standard error.

    Raises:
        ShardsError, ConfigError, CheckpointError, ResourcesError, TrackingError: a setting or an
            input is wrong, or the cluster or a storage cannot be used. Most of these errors are
            raised before any worker starts.
        SerRayError: the training failed; the message gives the reason.
    """
    from ser_ray.distributed.epoch_table import EpochTable
    from ser_ray.distributed.train import train as run

    if on_epoch is not None:
        return run(shards, recipe, run_config, on_epoch=on_epoch, address=address)
    with EpochTable(stderr_console(), recipe.epochs) as show:
        return run(shards, recipe, run_config, on_epoch=show, address=address)


def recipe_like(run_id: str, tracking_uri: str = "") -> TrainConfig:
    """Read the recipe of an MLflow run: a training, trial, fold, search or cross-validation.

    For a search, this is the recipe of the best trial. For a cross-validation, the recipe has
    the mean temperature of the folds, which a model of the protocol `all` needs.

    Raises:
        TrackingError: there is no such run, it has no recipe, or the store does not answer.
    """
    from ser_ray.tracking.registry import recipe_of_run

    return TrainConfig.from_dict(recipe_of_run(run_id, tracking_uri))


def lr_range(
    shards: ShardLocations = SHARDS,
    recipe: TrainConfig = TrainConfig(),
    run_config: RunConfig = RunConfig(),
    test: LrRangeConfig = LrRangeConfig(),
    *,
    address: str = "",
) -> "LrRangeResult":
    """Propose the two bounds of a recipe's learning rate by a range test (Smith 2015).

    Raises:
        DivergedError: the loss did not fall at any learning rate.
        SerRayError: as `train`.
    """
    from ser_ray.distributed.lr_range import run_lr_range

    return run_lr_range(shards, recipe, run_config, test, address=address)


def tune(
    shards: ShardLocations = SHARDS,
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
        recipe: recipe whose hyperparameters the trials change. If the search space contains this
            recipe, the first trial trains it.
        run_config: devices, names and places of all trials.
        search: search space, number of trials, searcher and scheduler.
        slots: CPUs and GPUs of a trial.

    Raises:
        SerRayError: as `train`, or no trial succeeded; the message gives the first reason.
    """
    from ser_ray.corpus.folds import CROSS_CORPUS, DEPENDENCE
    from ser_ray.search.trial_table import TrialTable
    from ser_ray.search.tune_run import num_trials
    from ser_ray.search.tuner import search as run

    # For cross-corpus, the label depends on whether the corpora share speakers, which is not known
    # before the shards are read.
    label = "" if recipe.protocol == CROSS_CORPUS else DEPENDENCE[recipe.protocol == "random"]
    with TrialTable(stderr_console(), num_trials(recipe, search), label) as table:
        return run(shards, recipe, run_config, search, slots, show=table, address=address)


def refit(
    result: "TuneResult",
    shards: ShardLocations = SHARDS,
    run_config: RunConfig = RunConfig(),
    *,
    address: str = "",
) -> "TrainResult":
    """Train the best recipe of a search again, to get its model; raises the errors of `train`."""
    from ser_ray.tracking.registry import name_like

    run_config = replace(run_config, name=name_like(result.best.run_id))
    return train(shards, result.best.recipe, run_config, address=address)


def crossval(
    shards: ShardLocations = SHARDS,
    recipe: TrainConfig = TrainConfig(),
    run_config: RunConfig = RunConfig(),
    config: CrossvalConfig = CrossvalConfig(),
    slots: SlotConfig = SlotConfig(),
    *,
    address: str = "",
) -> "CrossvalResult":
    """Train and score the folds of the recipe's protocol; the same call resumes the trainings.

    Args:
        shards: folder or URI of the shard set, or of several that are trained on together.
        recipe: recipe of every fold.
        run_config: devices, names and places of all trainings.
        config: seeds, folds, and the part that is scored.
        slots: CPUs and GPUs of a training.

    Raises:
        SerRayError: as `train`, or a training of a fold failed.
    """
    from ser_ray.search.crossval import crossval as run
    from ser_ray.search.crossval import plan_crossval
    from ser_ray.search.trial_table import TrialTable

    plan = plan_crossval(shards, recipe, config)
    with TrialTable(stderr_console(), len(plan.points), plan.label, mark_best=False) as table:
        return run(plan, run_config, slots, show=table, address=address)


def load_model(
    model: "str | Path", tracking_uri: str = "", *, min_confidence: float = 0.0
) -> "Predictor":
    """Load a model to predict the emotion in audio files.

    Args:
        model: folder or URI of a checkpoint or of a finished run, a run's name or id,
            `runs:/ID/model`, or `models:/NAME@ALIAS`.
        min_confidence: lowest probability of a predicted emotion. If all emotions of a recording
            are less probable, its status is `unsure`, and it gets no emotion.

    Raises:
        CheckpointError: there is no checkpoint.
        ConfigError: `min_confidence` is not from 0 to 1.
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
    """Predict the emotion in many files on Ray; the same call resumes an interrupted pass.

    Args:
        files: files, folders, URIs or patterns like `clips/**/*.wav`, or the result of
            `list_audio`.
        model: as in `load_model`, or a loaded model.
        output: table to write, with one row for each file: .parquet, .csv or .jsonl.

    Raises:
        CorpusError: there are no such files.
        CheckpointError, TrackingError: there is no such model.
        ConfigError, ResourcesError: the output cannot be written, or a node cannot open the files.
        SerRayError: the pass ended early; the finished predictions are kept.
    """
    from ser_ray.cluster.connect import cluster
    from ser_ray.corpus.audio_files import AudioFiles, list_audio
    from ser_ray.inference.batch import predict_many
    from ser_ray.inference.predictor import Predictor
    from ser_ray.inference.results import output_suffix

    listed = files if isinstance(files, AudioFiles) else list_audio([str(file) for file in files])
    output_suffix(output)
    predictor = model if isinstance(model, Predictor) else load_model(model, tracking_uri)
    with cluster(address, has_actor_pool=True):
        return predict_many(listed.files, predictor, output, problems=listed.problems)


def export(
    model: "str | Path",
    output: str = "",
    format: Literal["onnx", "torch"] = "onnx",
    *,
    tracking_uri: str = "",
) -> "ExportResult":
    """Export a model as one file, which computes the probability of every label from a waveform.

    Args:
        model: as in `load_model`.
        output: file to write; the default is `ser-ray-out/model.onnx` or `.pt2`.
        format: ONNX, or torch's exported program.

    Raises:
        CheckpointError, TrackingError: there is no such model.
        ConfigError, ResourcesError: the output cannot be opened, or Ray deletes its folder after
            the job.
        SerRayError: a package is missing, the file cannot be written, or its probabilities differ
            from those of the model.
    """
    from ser_ray.inference.export import export as run
    from ser_ray.tracking.registry import local_model

    output = output or f"{OUT}/model.{'onnx' if format == 'onnx' else 'pt2'}"
    with local_model(model, tracking_uri) as checkpoint:
        return run(checkpoint, output, format)


def register(
    run_id: str, name: str = "ser-ray", alias: str = "champion", *, tracking_uri: str = ""
) -> tuple[str, str]:
    """Register a run's model in MLflow, with its model card as description.

    Args:
        run_id: MLflow run of a training, a search or a cross-validation.
        name: name of the registered model.
        alias: alias of the new version, whose address is then `models:/NAME@ALIAS`. If empty, the
            version gets no alias.

    Returns:
        The number of the version, and the model card as Markdown.

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
    label_map: str = "",
    tracking_uri: str = "",
    address: str = "",
) -> "PrepareSummary":
    """Prepare a corpus with the feature settings of a model.

    Args:
        model: as in `load_model`.
        corpus: folder, URI or table, as in `PrepareConfig`.
        shards: folder or URI to write the shards to.
        missing: words in a table that mean a missing value.
        columns: names of columns in a table, as in `PrepareConfig`.
        label_map: how labels are mapped, as in `evaluate`.

    Raises:
        CheckpointError, TrackingError: there is no such model, or it does not know the labels.
        CorpusError, ShardsError, ConfigError, ResourcesError: as `prepare`.
    """
    from ser_ray.corpus.labels import map_labels
    from ser_ray.corpus.manifest import list_corpus
    from ser_ray.evaluation.evaluate import require_known_labels
    from ser_ray.shards.config import column_names
    from ser_ray.shards.corpora import corpus_name
    from ser_ray.shards.prepare import prepare as run
    from ser_ray.tracking.registry import local_model
    from ser_ray.training.checkpoint import ENCODER, read_card

    listed = list_corpus(corpus, missing, column_names(columns))
    with local_model(model, tracking_uri) as checkpoint:
        card = read_card(checkpoint)
        name = corpus_name(shards)
        mapped = map_labels({name: listed.labels}, label_map, card.labels)[name]
        # A training that mapped labels may have used this corpus. `evaluate` then maps the labels
        # in the same way, so the names in the corpus need not be those of the model.
        if label_map or not card.corpora:
            require_known_labels(card, mapped.values(), corpus)
        copied, kind = checkpoint / ENCODER, card.config.feature
        encoder = f"{kind}={copied if copied.exists() else card.encoder_file}"
        config = PrepareConfig(
            corpus=corpus,
            shards=shards,
            missing=missing,
            columns=columns,
            features=card.features,
            encoder=(encoder,) if card.encoder else (),
        )
        return run(config, listed=listed, address=address)


def evaluate(
    model: "str | Path",
    shards: ShardLocations = "",
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
    """Score a model, by default on the test part of its own fold.

    The scores of this part are recorded in the MLflow run and the page of the training, if the
    checkpoint names them. Otherwise, the scores are written to a page in `ser-ray-out/evaluations`.

    Args:
        model: as in `load_model`.
        shards: shard sets to evaluate on: those of the training, or shards of other speakers. The
            default is the training's shards at their recorded location, or in `ser-ray-out`.
        label_map: how labels are mapped, as in `TrainConfig`, but to the labels of the model.
        protocol: protocol whose fold is tested, instead of the model's own protocol.
        fold: fold to test, from 0, instead of the model's own fold.
        allow_seen_speakers: also score speakers that the model was trained or validated on.
        under: also score the clips under these groups of simulated recording conditions
            (`ser_ray.features.conditions`). The clips' files are decoded again.
        audio: whether the report contains the audio of the clips that it shows.

    Raises:
        CorpusError: with `under`, the file of a clip cannot be read.
        CheckpointError, ShardsError, ConfigError: the shards are missing or do not fit the model,
            or the model was trained or validated on the speakers.
        TrackingError: there is no such run or registered model.
        SerRayError: with `under`, Ray cannot be used, or the pass over the clips ended early.
    """
    from ser_ray.evaluation.evaluate import evaluate as run
    from ser_ray.evaluation.evaluate import shards_of
    from ser_ray.evaluation.pages import evaluation_page
    from ser_ray.evaluation.rendering import store_page, stored_page
    from ser_ray.evaluation.to_mlflow import record_evaluation
    from ser_ray.storage.paths import short_digest
    from ser_ray.tracking.registry import local_model
    from ser_ray.tracking.tracker import store_of_run

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
            from ser_ray.cluster.connect import cluster
            from ser_ray.evaluation.robustness import predict_conditions, score_under
            from ser_ray.inference.predictor import Predictor

            with cluster(address, has_actor_pool=True):
                predicted = predict_conditions(evaluation, Predictor(checkpoint), under)
            evaluation = replace(evaluation, under=score_under(evaluation, predicted))
    if evaluation.origin and evaluation.is_own_test:
        try:
            recorded, run_id = evaluation.origin["tracking_uri"], evaluation.origin["run_id"]
            uri = store_of_run(tracking_uri, recorded, run_id)
            evaluation = replace(evaluation, origin={**evaluation.origin, "tracking_uri": uri})
            record_evaluation(evaluation, audio=audio)
            evaluation = replace(evaluation, is_recorded=True)
        except TrackingError as error:
            logger.warning("the scores are not recorded in the training's MLflow run: %s", error)
    if not (evaluation.report and stored_page(evaluation.report)):
        digest = short_digest(f"{model} {shards} {protocol} {fold} {label_map} {under}")
        evaluation = replace(evaluation, report=f"{OUT}/evaluations/{digest}.html")
        page = evaluation_page(evaluation, model=str(model), audio=audio)
        store_page(page, evaluation.report)
    return evaluation


def compare(first: "Evaluation", second: "Evaluation") -> "Comparison":
    """Compare two models that were scored on the same clips, by paired tests.

    Raises:
        ConfigError: the models were scored on different clips, or have different labels.
    """
    from ser_ray.evaluation.evaluate import compare as run

    return run(first, second)
