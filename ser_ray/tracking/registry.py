"""Looks up runs, recipes, scores and models in MLflow, and registers models.

The name of a model is one of these:
- the folder or URI of a checkpoint, or of a finished run;
- a run's name or id, or `runs:/ID/model`;
- a registered version: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from functools import partial
from io import StringIO
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from ser_ray.errors import CheckpointError, TrackingError
from ser_ray.shards.card import UsedCorpus, have_prefixes
from ser_ray.shards.read import ShardSet
from ser_ray.tracking.run_metadata import MAX_TAG_LENGTH, SHARDS_TAG
from ser_ray.tracking.store import as_tracking_error, connect, model_location, resolve_uri
from ser_ray.tracking.tracker import flatten, model_id_of
from ser_ray.training.checkpoint import local_checkpoint, read_card, read_network
from ser_ray.training.checkpoint_card import CheckpointCard
from ser_ray.training.model import FRESH, Pretrained, read_pretrained, require_unseen_labels
from ser_ray.training.parts import select_rows
from ser_ray.training.recipe import TrainConfig

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SELECTED_BY, TIE_BROKEN_BY = "selected/ua", "selected/loss"
"""Metrics that rank finished trainings: by the highest UA, then by the lowest loss."""
FOLD_SETTINGS = {"protocol", "fold", "seed", "temperature"}
"""Settings in which a model of all speakers may differ from the cross-validation of its recipe."""
TEST_SCORES = "tables/test.json"
"""Artifact with the scores of the test part."""
WEIGHT_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
"""Suffixes of weight files. A name with one of these suffixes is not looked up in MLflow."""
ADVICE = (
    ". A model is named by the folder of a checkpoint or run, the name or id of a run, "
    "runs:/ID/model, or models:/NAME@ALIAS. --tracking-uri names the store"
)

logger = logging.getLogger(__name__)


@contextmanager
def local_model(model: str | Path, tracking_uri: str = "") -> Iterator[Path]:
    """Yield a model as a local checkpoint directory.

    A remote model is downloaded, and the download is deleted at the end.

    Args:
        model: name of the model, as the module's docstring describes it.
        tracking_uri: store in which ids and names are looked up, as `resolve_uri` takes it.

    Raises:
        TrackingError: there is no such run or registered model, or the store does not answer.
        CheckpointError: the folder cannot be read.
        ConfigError: no filesystem can open the folder's URI.
    """
    if location := model_location(str(model)):
        with local_checkpoint(location) as checkpoint:
            yield checkpoint
        return
    with TemporaryDirectory() as folder:
        yield fetch_checkpoint(str(model), tracking_uri, Path(folder))


def read_initial_weights(
    recipe: TrainConfig, shards: ShardSet, tracking_uri: str, folds: Sequence[int] = ()
) -> Pretrained:
    """Read the weights from which a training on these shards starts.

    Args:
        tracking_uri: as in `read_weights`.
        folds: the folds to train; by default, the recipe's fold.

    Raises:
        ConfigError: the shards do not have the feature, or its encoder was trained on the labels of
            a corpus in the shards.
        CheckpointError: the weights are those of a model that was trained or validated on speakers
            of a test part.
        CheckpointError, TrackingError: as `read_weights`.
    """
    card = shards.card
    if encoder := card.encoder_of(recipe.feature):
        kinds = {corpus.kind for corpus in shards.corpora} or {card.corpus}
        require_unseen_labels(recipe, encoder, kinds)
        return FRESH
    check = partial(_refuse_seen_speakers, recipe, shards, folds or (recipe.fold,))
    return read_weights(recipe.weights, card.labels, tracking_uri, check)


def _refuse_seen_speakers(
    recipe: TrainConfig, shards: ShardSet, folds: Sequence[int], model: CheckpointCard
) -> None:
    """Raise CheckpointError if a model of the same corpus has seen the test speakers of a fold."""
    theirs = _speaker_names(model.corpora, model.corpus, model.shards_fingerprint)
    ours = _speaker_names(shards.corpora, shards.card.corpus, shards.card.fingerprint)
    speakers = (*model.split["train_speakers"], *model.split["validation_speakers"])
    seen = set()  # the names of the model's speakers in these shards
    for their, our in product(theirs, ours):
        if their.is_same_corpus(our):
            names = [name for name in speakers if name.startswith(their.prefix)]
            seen |= {our.prefix + name.removeprefix(their.prefix) for name in names}
    if recipe.protocol == "random" or not seen:
        return
    clips = shards.clips()
    for fold in folds:
        test_speakers = select_rows(clips, replace(recipe, fold=fold)).test_speakers
        if tested := sorted(seen & {*test_speakers}):
            raise CheckpointError(
                f"weights is {recipe.weights}: this model was trained or validated on the speakers "
                f"{', '.join(tested)}, whom fold {fold} of {recipe.protocol} tests; choose the "
                "protocol and fold of the model, or other weights"
            )


class _SpeakerNames(NamedTuple):
    """A shard set of a training, and the prefix that its speakers' names have in this training."""

    fingerprint: str
    """Fingerprint of the shard set."""
    kind: str
    """Kind of corpus."""
    prefix: str
    """Prefix of the names, such as `emodb:`; empty if the names have none."""

    def is_same_corpus(self, other: "_SpeakerNames") -> bool:
        """Return whether two shard sets have the same speakers, as all sets of RAVDESS do."""
        return (
            self.fingerprint == other.fingerprint
            or self.kind == other.kind == "ravdess"
            or self.prefix == other.prefix != ""
        )


def _speaker_names(
    corpora: Sequence[UsedCorpus], kind: str, fingerprint: str
) -> list[_SpeakerNames]:
    """Return one entry for each corpus. If `corpora` is empty, there is only one shard set."""
    if not corpora:
        return [_SpeakerNames(fingerprint, kind, "")]
    has_prefixes = have_prefixes(corpora)
    return [
        _SpeakerNames(item.fingerprint, item.kind, f"{item.prefix}:" if has_prefixes else "")
        for item in corpora
    ]


def read_weights(
    weights: str,
    labels: Sequence[str],
    tracking_uri: str = "",
    check: Callable[[CheckpointCard], None] = lambda _: None,
) -> Pretrained:
    """Read the weights that `TrainConfig.weights` names.

    Args:
        weights: `imagenet`, `none`, a file of ResNet18 weights, or the name of a model.
        labels: labels of the training. If the model has others, its last layer is not used.
        tracking_uri: store in which ids and names are looked up, as `resolve_uri` takes it.
        check: called with the card of a model; it raises an error to refuse the model.

    Raises:
        CheckpointError: the weights cannot be read, or do not fit a ResNet18.
        TrackingError: there is no such run or registered model.
    """
    path = Path(weights).expanduser()
    if weights in ("imagenet", "none") or path.is_file() or path.suffix in WEIGHT_SUFFIXES:
        return read_pretrained(weights, len(labels))
    with local_model(weights, tracking_uri) as checkpoint:
        card = read_card(checkpoint)
        if card.encoder:
            raise CheckpointError(
                f"weights is {weights}: this model is a head on the encoder {card.config.feature}, "
                "and its weights do not fit a ResNet18"
            )
        check(card)
        state = read_network(checkpoint, card).state_dict()
    origin = f"the model {weights}, trained on {card.config.feature} of {card.trained_on}"
    if card.labels != tuple(labels):
        state = {name: value for name, value in state.items() if not name.startswith("fc.")}
        origin += f"; fresh: fc, because its labels are {', '.join(card.labels)}"
    logger.info("%-12s %s", "weights", origin)
    return Pretrained(origin, state)


def fetch_checkpoint(model: str, tracking_uri: str, folder: Path) -> Path:
    """Download a packaged model into an empty folder; return the directory of its checkpoint.

    Args:
        model: name or id of the run that logged the model, `runs:/ID/model`, or a registered
            version.
        tracking_uri: as `resolve_uri` takes it.

    Raises:
        TrackingError: there is no such run, model or alias, or the store does not answer.
    """
    uri = resolve_uri(tracking_uri)
    try:
        client = connect(uri)
    except TrackingError as error:
        raise TrackingError(
            f"{model}: no checkpoint here, and it cannot be looked up in MLflow: {error}"
        ) from error
    import mlflow

    with as_tracking_error(f"{model}: no such model in {uri}", ADVICE):
        path = mlflow.artifacts.download_artifacts(_model_uri(client, model), dst_path=str(folder))
        flavour = mlflow.models.Model.load(path).flavors.get("python_function", {})
    if "data" not in flavour:
        raise TrackingError(f"{model}: this model in {uri} is not one of ser_ray's{ADVICE}")
    return Path(path, flavour["data"])


def _model_uri(client: "MlflowClient", model: str) -> str:
    """Return the URI of a model in MLflow. If several runs have the name, the newest is used."""
    import mlflow

    if model.startswith("models:/"):
        return model
    if model.startswith("runs:/") or re.fullmatch(r"[0-9a-f]{32}", model):
        run = client.get_run(model.removeprefix("runs:/").removesuffix("/model"))
    else:
        found = mlflow.search_runs(
            filter_string=f"attributes.run_name = {_quoted(model)}",
            max_results=1,
            search_all_experiments=True,
            output_format="list",
        )
        if not found:
            raise TrackingError(
                f"{model}: no checkpoint here, and no run of this name in MLflow{ADVICE}"
            )
        run = found[0]
    if model_id := model_id_of(run):
        return f"models:/{model_id}"
    raise TrackingError(f"{run.info.run_id}: this run has no model{ADVICE}")


def _quoted(text: str) -> str:
    """Quote a text for MLflow's filters. They accept single or double quotes, but no escapes."""
    return f'"{text}"' if "'" in text else f"'{text}'"


def recipe_of_run(run_id: str, tracking_uri: str) -> dict[str, Any]:
    """Return the recipe that a run recorded, in the form of `TrainConfig.to_dict`.

    Raises:
        TrackingError: there is no such run, it has no recipe, or the store does not answer.
    """
    client = connect(resolve_uri(tracking_uri))
    import mlflow

    advice = (
        "; give the id of a run that ser-ray train, tune or crossval recorded, and name its store "
        "with --tracking-uri"
    )
    with as_tracking_error(f"{run_id}: no run with a recipe in {client.tracking_uri}", advice):
        recipe: dict[str, Any] = mlflow.artifacts.load_dict(f"runs:/{run_id}/config.json")
    return recipe


def name_like(run_id: str, changed_recipe: str = "") -> str:
    """Return the name for a run that trains the recipe of another run.

    Args:
        run_id: id of the other run.
        changed_recipe: fingerprint of the recipe, if the other run has another recipe.
    """
    return f"like-{run_id[:12]}" + (f"-{changed_recipe[:8]}" if changed_recipe else "")


def best_training_of(run_id: str, tracking_uri: str) -> str:
    """Return the id of the run with the best model of a training, cross-validation or search.

    For a training, this is the run itself. For a cross-validation, it is the fold with the best
    validation UA. The trials of a search keep no model. Therefore, for a search, it is the newest
    run that has trained the best trial's recipe on the same shards and has a model. `tune --refit`
    and `train --like` make such runs.

    Raises:
        TrackingError: there is no such run, or none of these runs has a model.
    """
    client = connect(resolve_uri(tracking_uri))
    import mlflow

    problem, advice = (
        f"{run_id}: no such run in {client.tracking_uri}",
        "; name the store with --tracking-uri",
    )
    with as_tracking_error(problem, advice):
        run = client.get_run(run_id)
        nested = f"tags.mlflow.parentRunId = '{run_id}'"
        children = mlflow.search_runs([run.info.experiment_id], nested, output_format="list")
        best = max(children or [run], key=_rank)
        best_id = str(best.info.run_id)
        if model_id_of(best):
            return best_id
        if SELECTED_BY not in best.data.metrics:
            raise TrackingError(
                f"{run_id}: neither this run nor one nested in it has a validation UA"
            )
        for found in _runs_like(best, client):
            if model_id_of(found):
                return str(found.info.run_id)
    raise TrackingError(
        f"{run_id}: its best training, {best_id}, has no model: train it again with ser-ray train "
        f"--like {best_id}, then repeat this command"
    )


def cross_validation_of(run_id: str, tracking_uri: str) -> "Run | None":
    """Return the newest cross-validation of a run's recipe on the same shards; None if none exists.

    The settings in FOLD_SETTINGS may differ. Cross-validations that have no scores of test parts,
    or whose protocol is `random`, are ignored.

    Raises:
        TrackingError: there is no such run, it has no recipe, or the store does not answer.
    """
    client = connect(resolve_uri(tracking_uri))
    with as_tracking_error(f"{run_id}: cannot be read from {client.tracking_uri}"):
        kind = "tags.kind = 'cross-validation'"
        for found in _runs_like(client.get_run(run_id), client, kind, FOLD_SETTINGS):
            if "test/ua" in found.data.metrics and found.data.params["protocol"] != "random":
                return found
    return None


def _runs_like(
    run: "Run", client: "MlflowClient", condition: str = "", ignored: Set[str] = frozenset()
) -> "Iterator[Run]":
    """Yield the runs that have the recipe and shards of a run, the newest first.

    Args:
        run: a run with a recorded recipe.
        client: of the store.
        condition: a further condition, in MLflow's filter syntax.
        ignored: settings of the recipe that may differ.
    """
    import mlflow

    names = flatten(recipe_of_run(run.info.run_id, client.tracking_uri)).keys() - ignored
    recipe = {name: run.data.params[name] for name in names}
    same_shards = f"tags.`{SHARDS_TAG}` = '{run.data.tags[SHARDS_TAG]}'"
    conditions = f"{condition} and {same_shards}" if condition else same_shards
    for found in mlflow.search_runs([run.info.experiment_id], conditions, output_format="list"):
        if recipe.items() <= found.data.params.items():
            yield found


def _rank(run: "Run") -> tuple[float, float]:
    """Return a key that is larger for a better run."""
    metrics = run.data.metrics
    return metrics.get(SELECTED_BY, -1.0), -metrics.get(TIE_BROKEN_BY, 0.0)


def read_test_scores(run_id: str, tracking_uri: str) -> dict[str, Any] | None:
    """Return the scores of a run's test part, or None if it was not evaluated.

    Raises:
        TrackingError: the store does not answer, or has no such run.
    """
    client = connect(resolve_uri(tracking_uri))
    import mlflow

    with as_tracking_error(f"{run_id}: cannot be read from {client.tracking_uri}"):
        if TEST_SCORES not in {item.path for item in client.list_artifacts(run_id, "tables")}:
            return None
        scores: dict[str, Any] = mlflow.artifacts.load_dict(f"runs:/{run_id}/{TEST_SCORES}")
    return scores


def register_model(
    run_id: str, tracking_uri: str, name: str, alias: str, tags: Mapping[str, str], card: str
) -> str:
    """Register a run's packaged model as a new version; return the number of the version.

    Args:
        card: description of the version, as Markdown. Its middle is left out if it is too long.

    Raises:
        TrackingError: the store refused the version, its description or its alias. Then no new
            version remains.
    """
    client = connect(resolve_uri(tracking_uri))
    import mlflow
    from mlflow.exceptions import MlflowException

    with as_tracking_error(f"{client.tracking_uri}: {name} was not registered"):
        with redirect_stderr(StringIO()):  # MLflow prints the version, and so does the caller
            made = mlflow.register_model(_model_uri(client, run_id), name, tags=dict(tags))
        try:
            client.update_model_version(name, made.version, description=_shortened(card))
            if alias:
                client.set_registered_model_alias(name, alias, made.version)
        except MlflowException:
            client.delete_model_version(name, made.version)
            raise
    return str(made.version)


def _shortened(card: str) -> str:
    """Return a model card that every store accepts as a description.

    A longer card loses its middle, because its end states the limits and the licence of the model.
    """
    if len(card) <= MAX_TAG_LENGTH:
        return card
    mark = "\n\n[...]\n\n"
    end = card[card.find("\n## Limits") :][-MAX_TAG_LENGTH // 2 :]
    return card[: MAX_TAG_LENGTH - len(mark) - len(end)] + mark + end
