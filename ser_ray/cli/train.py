"""The verbs that train: train, lr-range, tune and crossval."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from ser_ray import api
from ser_ray.cli.parsing import parse_over
from ser_ray.cli.verb import Verb, VerbResult, say
from ser_ray.command import flags_of, next_command
from ser_ray.distributed.run_config import RunConfig
from ser_ray.errors import SerRayError
from ser_ray.features.config import KINDS
from ser_ray.search.config import CrossvalConfig, SlotConfig, TuneConfig
from ser_ray.training.recipe import LrRangeConfig, TrainConfig

logger = logging.getLogger(__name__)

DESCRIBED = (
    "feature", "protocol", "fold", "epochs", "batch_size", "lr_min", "lr_max", "weights", "seed",
)  # fmt: skip
"""Fields of the recipe that `say_training` prints as text. Other changed fields become flags."""


@dataclass(frozen=True, kw_only=True)
class TrainingVerb(Verb):
    """Flags of every verb that trains."""

    shards: tuple[str, ...] = (api.SHARDS,)
    """Folder or URI of the shard set that `prepare` wrote. If there are several, one model is
    trained on all of them together."""
    recipe: TrainConfig = field(default_factory=TrainConfig)
    run_config: RunConfig = field(default_factory=RunConfig)
    resumes = True

    @property
    def inputs(self) -> tuple[tuple[str, ...], TrainConfig, RunConfig]:
        """The first three arguments of `api.train`, `lr_range`, `tune` and `crossval`."""
        return self.shards, self.recipe, self.run_config

    def check(self) -> None:
        """Warn if the shards cannot be opened; `prepare` may make them before the training."""
        from ser_ray.shards.corpora import open_corpora

        try:
            open_corpora(self.shards, self.recipe.label_map)
        except SerRayError as error:
            logger.warning("%s", error)

    def place(self) -> str:
        """Return where Ray runs the trainings: on this machine or on a cluster."""
        from ser_ray.cluster.connect import place_of_ray

        return place_of_ray(self.common.address)

    def training_result(self, result: "api.TrainResult") -> VerbResult:
        """Return what the verb prints about a finished training."""
        if "val/ua" in result.selected:
            command = next_command("evaluate", result.checkpoint, shards=self.shards)
            next_step = f"test it      {command}"
        else:
            uri = self.run_config.tracking_uri
            command = next_command("register", result.run_id, tracking_uri=uri)
            next_step = f"register it  {command}"
        data = {
            "name": result.name,
            "checkpoint": result.checkpoint,
            "protocol": result.card.split["label"],
            "corpus": result.card.corpus,
            "selected": result.selected,
            "history": result.history,
        }
        return _run_result(result, data, next_step, result.undelivered)


def _run_result(
    result: "api.TrainResult | api.LrRangeResult | api.TuneResult | api.CrossvalResult",
    data: dict[str, Any],
    next_step: str,
    problem: str = "",
) -> VerbResult:
    """Return what a verb with an MLflow run prints, with links to the run."""
    from ser_ray.tracking.views import run_links

    links = run_links(result.tracking_uri, result.run_id)
    lines = [
        str(result),
        f"MLflow run   {result.run_id}: {links.run}",
        f"all runs     {links.all_runs}",
    ]
    if links.server_command:
        lines.append(f"served by    {links.server_command}")
    shared = {name: getattr(result, name) for name in ("run_id", "tracking_uri", "report")}
    return VerbResult(shared | data, "\n".join(lines), next_step, problem)


@dataclass(frozen=True, kw_only=True)
class Train(TrainingVerb):
    """Train one fold; the same command resumes an interrupted training."""

    like: str = ""
    """Id of an MLflow run whose recipe is trained again: a training, a search, a cross-validation
    or a trial. Other flags replace settings of that recipe."""

    def resolved(self, flags: Sequence[str]) -> Self:
        """Fill in the recipe of the run `like`, and a name for the new run."""
        if not self.like:
            return self
        from ser_ray.tracking.registry import name_like

        recipe = api.recipe_like(self.like, self.run_config.tracking_uri)
        verb = parse_over(flags, type(self)(recipe=recipe))
        changed = verb.recipe.fingerprint if verb.recipe != recipe else ""
        name = self.run_config.name or name_like(self.like, changed)
        return replace(verb, run_config=replace(self.run_config, name=name))

    def place(self) -> str:
        """Return whether the training runs on Ray or in this process."""
        from ser_ray.cluster.connect import place_of_training

        return place_of_training(self.common.address, self.run_config.worker_range[1])

    def run(self) -> VerbResult:
        """Train, and report the checkpoint."""
        say_training(self.shards, self.recipe, [self.recipe.fold])
        return self.training_result(api.train(*self.inputs, address=self.common.address))


@dataclass(frozen=True, kw_only=True)
class LrRange(TrainingVerb):
    """Propose the two bounds of the learning rate by a range test (Smith 2015)."""

    test: LrRangeConfig = field(default_factory=LrRangeConfig)
    resumes = False

    def place(self) -> str:
        """Return whether the test runs on Ray or in this process."""
        from ser_ray.cluster.connect import place_of_training

        return place_of_training(self.common.address, 1)

    def run(self) -> VerbResult:
        """Run the test, and report the command that trains with the proposed bounds."""
        say_training(self.shards, self.recipe, [self.recipe.fold])
        say("range test", f"{self.test.steps} steps, {self.test.lowest:g} to {self.test.highest:g}")
        result = api.lr_range(*self.inputs, self.test, address=self.common.address)
        lr_min, lr_max = result.bounds
        command = next_command(
            "train",
            shards=self.shards,
            recipe=replace(self.recipe, lr_min=lr_min, lr_max=lr_max),
            run_config=replace(self.run_config, name=""),
            address=self.common.address,
        )
        return _run_result(result, asdict(result.proposal), f"train with   {command}")


@dataclass(frozen=True, kw_only=True)
class Tune(TrainingVerb):
    """Search for the best recipe; the same command resumes an interrupted search."""

    search: TuneConfig = field(default_factory=TuneConfig)
    slots: SlotConfig = field(default_factory=SlotConfig)

    def run(self) -> VerbResult:
        """Search, and train the best recipe again if `refit` is set."""
        say_training(self.shards, self.recipe, [self.recipe.fold])
        search = self.search
        trials = "all points" if search.searcher == "grid" else f"{search.trials} trials"
        say("search", f"{trials}, searcher {search.searcher}, scheduler {search.scheduler}")
        for dimension in search.dimensions:
            say("", f"{dimension.name}: {dimension}")
        result = api.tune(*self.inputs, search, self.slots, address=self.common.address)
        best = result.best
        data = {
            "name": result.name,
            "protocol": result.label,
            "states": Counter(trial.state for trial in result.trials),
            "best": {
                "run_id": best.run_id,
                "selected": best.selected,
                "recipe": best.recipe.to_dict(),
            },
        }
        searched = _run_result(result, data, f"train it     {result.train_command}")
        if not search.refit:
            return searched
        refitted = self.training_result(
            api.refit(result, self.shards, self.run_config, address=self.common.address)
        )
        data, text = searched.data | {"refit": refitted.data}, f"{searched.text}\n{refitted.text}"
        return replace(refitted, data=data, text=text)


@dataclass(frozen=True, kw_only=True)
class Crossval(TrainingVerb):
    """Train and score the folds of a protocol; the same command resumes an interrupted run."""

    crossval: CrossvalConfig = field(default_factory=CrossvalConfig)
    slots: SlotConfig = field(default_factory=SlotConfig)

    def run(self) -> VerbResult:
        """Train the folds, and report the pooled scores."""
        from ser_ray.corpus.folds import num_folds

        config = self.crossval
        folds: Sequence[int] = config.folds
        if not folds:
            clips = api.open_shards(self.shards, self.recipe.label_map).clips()
            folds = range(num_folds(self.recipe.protocol, clips))
        say_training(self.shards, self.recipe, folds)
        say("trainings", f"{config.seeds} of each fold, scored on its {config.part} part")
        result = api.crossval(*self.inputs, config, self.slots, address=self.common.address)
        if config.part == "test":
            uri = self.run_config.tracking_uri
            command = next_command("register", result.run_id, tracking_uri=uri)
            next_step = f"register it  {command}"
        else:
            command = next_command(
                "crossval",
                shards=self.shards,
                crossval=replace(config, part="test"),
                slots=self.slots,
                recipe=self.recipe,
                run_config=replace(self.run_config, name=""),
                address=self.common.address,
            )
            next_step = f"test it      {command}"
        return _run_result(result, {"name": result.name} | result.to_dict(), next_step)


def say_training(locations: Sequence[str], recipe: TrainConfig, folds: Sequence[int]) -> None:
    """Print the shards, the size of every part of these folds, and the recipe.

    Raises:
        ShardsError: there is no shard set.
        ConfigError: there is no such fold, a part is empty, or the shard sets have different
            features.
    """
    from ser_ray.shards.corpora import open_corpora
    from ser_ray.training.parts import select_rows

    shards = open_corpora(locations, recipe.label_map)
    clips = shards.clips()
    speakers = len(set(clips["speaker"].to_pylist()))
    is_first_window = clips["window"].to_numpy() == 0  # a long clip has several windows
    size = f"{shards.num_clips} clips, {speakers} speakers, {len(shards.card.labels)} labels"
    say("shards", f"{' '.join(locations)}: {size}")
    for corpus in shards.corpora:
        say("", str(corpus))
    splits = [select_rows(clips, replace(recipe, fold=fold)) for fold in folds]
    say("protocol", splits[0].label if len(folds) == 1 else f"{recipe.protocol}, every fold has")
    for part in ("train", "validation", "test"):
        num_clips = _format_range(is_first_window[getattr(split, part)].sum() for split in splits)
        num_speakers = _format_range(len(getattr(split, f"{part}_speakers")) for split in splits)
        say(part, f"{num_clips} clips, {num_speakers} speakers")
    steps = _format_range(max(len(split.train) // recipe.batch_size, 1) for split in splits)
    changed = "".join(f" {word}" for word in flags_of(recipe, without=DESCRIBED))
    say(
        "recipe",
        f"{recipe.feature}, {recipe.epochs} epochs, {steps} steps of {recipe.batch_size} clips "
        f"each, learning rate {recipe.lr_min:g} to {recipe.lr_max:g}",
    )
    weights = recipe.weights if recipe.feature in KINDS else "of the head: fresh"
    say("", f"initial weights {weights}, seed {recipe.seed}{changed}")


def _format_range(numbers: Iterable[int]) -> str:
    ordered = sorted(numbers)
    lowest, highest = ordered[0], ordered[-1]
    return f"{lowest}" if lowest == highest else f"{lowest} to {highest}"
