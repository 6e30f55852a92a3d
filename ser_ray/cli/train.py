"""Verbs that train: train, lr-range, tune and crossval."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Self

from ser_ray import api
from ser_ray.cli.parsing import parse_over
from ser_ray.cli.verb import Outcome, Verb
from ser_ray.distributed.config import RunConfig
from ser_ray.search.space import CrossvalConfig, SlotConfig, TuneConfig
from ser_ray.training.config import LrRangeConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class TrainingVerb(Verb):
    """Flags of every verb that trains."""

    shards: str = api.SHARDS
    """Folder or URI of the shard set that `prepare` wrote; one serves all feature kinds."""
    recipe: TrainConfig = field(default_factory=TrainConfig)
    run_config: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True, kw_only=True)
class Train(TrainingVerb):
    """Train one fold; the same command resumes an interrupted training."""

    like: str = ""
    """MLflow run of a training, a search or a trial, whose recipe is trained. Further flags replace
    single settings of that recipe."""

    def resolved(self, flags: Sequence[str]) -> Self:
        """Fill in the recipe of the run that --like names."""
        if not self.like:
            return self
        from ser_ray.tracking.registry import name_like

        theirs = api.recipe_like(self.like, self.run_config.tracking_uri)
        verb = parse_over(flags, type(self)(recipe=theirs))
        changed = verb.recipe.fingerprint if verb.recipe != theirs else ""
        name = self.run_config.name or name_like(self.like, changed)
        return replace(verb, run_config=replace(self.run_config, name=name))

    def run(self) -> Outcome:
        """Train and say where the checkpoint is."""
        return train_outcome(
            api.train(self.shards, self.recipe, self.run_config, address=self.common.address)
        )


def train_outcome(result: "api.TrainResult") -> Outcome:
    """Make the output of a finished training."""
    selected, card = result.selected, result.card
    data = {
        "name": result.name,
        "checkpoint": result.checkpoint,
        "run_id": result.run_id,
        "tracking_uri": result.tracking_uri,
        "protocol": card.split["label"],
        "corpus": card.corpus,
        "selected": selected,
        "history": result.history,
    }
    lines = (
        f"trained on   {card.trained_on}, {card.split['label']}",
        f"validation   UA {selected['val/ua']:.1%}, WA {selected['val/wa']:.1%} in epoch "
        f"{selected['epoch']:.0f}, the {card.config.keep} of {len(result.history)}",
        f"checkpoint   {result.checkpoint}",
        *_run_lines(result.run_id, result.tracking_uri),
    )
    return Outcome(data, "\n".join(lines))


def _run_lines(run_id: str, tracking_uri: str) -> list[str]:
    from ser_ray.tracking.views import links

    found = links(tracking_uri, run_id)
    lines = [f"MLflow run   {run_id}: {found.run}", f"all runs     {found.runs}"]
    return [*lines, f"served by    {found.command}"] if found.command else lines


@dataclass(frozen=True, kw_only=True)
class LrRange(TrainingVerb):
    """Propose the two bounds of the learning rate by a range test (Smith 2015)."""

    test: LrRangeConfig = field(default_factory=LrRangeConfig)

    def run(self) -> Outcome:
        """Run the test and print the command that trains with its bounds."""
        result = api.lr_range(
            self.shards, self.recipe, self.run_config, self.test, address=self.common.address
        )
        found = result.found
        bounds = f"--lr-min {found.lr_min:.1e} --lr-max {found.lr_max:.1e}"
        lines = (
            f"range test   {result.label}: {len(found.learning_rates)} steps, "
            f"{found.learning_rates[0]:.0e} to {found.learning_rates[-1]:.0e}",
            *_run_lines(result.run_id, result.tracking_uri),
            f"train with   ser-ray train --shards {self.shards} {bounds}",
        )
        data = asdict(found) | {"run_id": result.run_id, "tracking_uri": result.tracking_uri}
        return Outcome(data, "\n".join(lines))


@dataclass(frozen=True, kw_only=True)
class Tune(TrainingVerb):
    """Search for the best recipe; the same command resumes an interrupted search."""

    search: TuneConfig = field(default_factory=TuneConfig)
    slots: SlotConfig = field(default_factory=SlotConfig)

    def run(self) -> Outcome:
        """Search, and with --refit train the best recipe again."""
        result = api.tune(
            self.shards,
            self.recipe,
            self.run_config,
            self.search,
            self.slots,
            address=self.common.address,
        )
        best, recipe = result.best, result.best.recipe
        states = [trial.state for trial in result.trials]
        counts = {state: states.count(state) for state in dict.fromkeys(states)}
        counted = ", ".join(f"{count} {state}" for state, count in counts.items())
        lines = [
            f"searched     {len(result.trials)} trials: {counted}",
            f"best         trial {best.number}: UA {best.selected['val/ua']:.1%}, WA "
            f"{best.selected['val/wa']:.1%} in epoch {best.selected['epoch']:.0f} ({result.label})",
            f"             {recipe.feature}, lr_min {recipe.lr_min:.2e}, "
            f"lr_max {recipe.lr_max:.2e}",
            f"kept in      {result.best_recipe}",
            *_run_lines(result.run_id, result.tracking_uri),
            f"train it     {result.again}",
        ]
        data = {
            "name": result.name,
            "run_id": result.run_id,
            "tracking_uri": result.tracking_uri,
            "protocol": result.label,
            "states": counts,
            "best": {"run_id": best.run_id, "selected": best.selected, "recipe": recipe.to_dict()},
        }
        if self.search.refit:
            fitted = train_outcome(
                api.refit(result, self.shards, self.run_config, address=self.common.address)
            )
            lines[-1] = fitted.text
            data["refit"] = fitted.data
        return Outcome(data, "\n".join(lines))


@dataclass(frozen=True, kw_only=True)
class Crossval(TrainingVerb):
    """Train and test every fold of a protocol; the same command resumes where it stopped."""

    crossval: CrossvalConfig = field(default_factory=CrossvalConfig)
    slots: SlotConfig = field(default_factory=SlotConfig)

    def run(self) -> Outcome:
        """Train the folds and print the pooled scores."""
        result = api.crossval(
            self.shards,
            self.recipe,
            self.run_config,
            self.crossval,
            self.slots,
            address=self.common.address,
        )
        lines = (
            result.text(),
            f"predictions  {result.table}",
            *_run_lines(result.run_id, result.tracking_uri),
        )
        data = {"name": result.name, "run_id": result.run_id, **result.to_dict()}
        return Outcome(data, "\n".join(lines))
