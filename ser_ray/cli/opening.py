"""Prints the first lines of a verb, before anything slow is imported."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ser_ray.command import flags_of
from ser_ray.features.config import KINDS
from ser_ray.progress import stderr_console
from ser_ray.training.config import TrainConfig

NAMED = (
    "feature", "protocol", "fold", "epochs", "batch_size", "lr_min", "lr_max", "weights", "seed",
)  # fmt: skip
"""Fields of the recipe that `say_training` prints in sentences, not as flags."""


def say(name: str, text: str) -> None:
    """Print a line on standard error: a name and a text."""
    stderr_console().print(f"{name:12} {text}", markup=False)


def say_training(locations: Sequence[str], recipe: TrainConfig, folds: Sequence[int]) -> None:
    """Print the shards, the clips and speakers of each part of these folds, and the recipe.

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
    size = f"{clips.num_rows} clips, {speakers} speakers, {len(shards.card.labels)} labels"
    say("shards", f"{' '.join(locations)}: {size}")
    for part in shards.corpora:
        say("", str(part))
    splits = [select_rows(clips, replace(recipe, fold=fold)) for fold in folds]
    say("protocol", splits[0].label if len(folds) == 1 else f"{recipe.protocol}, every fold has")
    for name in ("train", "validation", "test"):
        num_clips = _range(len(getattr(split, name)) for split in splits)
        num_speakers = _range(len(getattr(split, f"{name}_speakers")) for split in splits)
        say(name, f"{num_clips} clips, {num_speakers} speakers")
    steps = _range(max(len(split.train) // recipe.batch_size, 1) for split in splits)
    changed = "".join(f" {word}" for word in flags_of(recipe, without=NAMED))
    say(
        "recipe",
        f"{recipe.feature}, {recipe.epochs} epochs, {steps} steps of {recipe.batch_size} clips "
        f"each, learning rate {recipe.lr_min:g} to {recipe.lr_max:g}",
    )
    weights = recipe.weights if recipe.feature in KINDS else "of the head: fresh"
    say("", f"initial weights {weights}, seed {recipe.seed}{changed}")


def _range(numbers: Iterable[int]) -> str:
    found = sorted(numbers)
    return f"{found[0]}" if found[0] == found[-1] else f"{found[0]} to {found[-1]}"
