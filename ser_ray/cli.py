"""`ser-ray <verb>`: the command line.

Every verb is a dataclass below, made of the same configuration dataclasses that the functions take,
so a flag is a field and its help the field's description. Nothing heavy is imported before a verb
runs. `jobs/*.py` are these verbs for `ray job submit`.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import tyro

from ser_ray.errors import SerRayError
from ser_ray.features.config import FeatureConfig
from ser_ray.shards.config import PrepareConfig
from ser_ray.training.config import RunConfig, TrainConfig

OUT = "ser-ray-out"
STAND_IN = f"{OUT}/stand-in"
"""Where a pipeline without a corpus makes one."""
STAND_IN_RECIPE = {"weights": "none", "crop_frames": 64, "epochs": 24, "lr_max": 4e-3}
"""What it changes of the recipe, where the user leaves the default."""


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every verb takes."""

    address: str = ""
    """Ray cluster to join; RAY_ADDRESS, the surrounding job's, or this machine alone if empty."""
    json: bool = False
    """Print the result as JSON on standard output; progress stays on standard error."""
    dry_run: bool = False
    """Print the resolved configuration and stop."""

    def resolved(self) -> Self:
        """The verb with everything that follows from its other settings filled in."""
        return self


@dataclass(frozen=True, kw_only=True)
class Prepare(Common):
    """Decode a corpus into Parquet shards of features."""

    prepare: PrepareConfig


@dataclass(frozen=True, kw_only=True)
class Train(Common):
    """Train one fold; the same command goes on where it was interrupted."""

    shards: str = f"{OUT}/shards"
    """Folder or URI of the shard set that `prepare` wrote."""
    recipe: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True, kw_only=True)
class Evaluate(Common):
    """Score a trained model on the test part of its own fold."""

    model: tyro.conf.Positional[str]
    """Checkpoint folder or URI that `train` printed."""
    shards: str = f"{OUT}/shards"
    """The shard set it was trained on."""


@dataclass(frozen=True, kw_only=True)
class Predict(Common):
    """Name the emotion in audio or video files."""

    files: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders or URIs."""
    model: str
    """Checkpoint folder or URI that `train` printed."""


@dataclass(frozen=True, kw_only=True)
class Pipeline(Common):
    """The whole way: prepare, train, evaluate, predict."""

    corpus: str = ""
    """RAVDESS folder or URI, or a table of an own corpus. Without it a small synthetic stand-in
    corpus is made and a short recipe without pretrained weights is used on it."""
    shards: str = ""
    """Where the shards go; `ser-ray-out/shards`, or `ser-ray-out/stand-in-shards`, if empty."""
    features: FeatureConfig = field(default_factory=FeatureConfig)
    recipe: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def resolved(self) -> Self:
        """Fill in where the shards go and, without a corpus, the stand-in and its recipe."""
        if self.corpus:
            return replace(self, shards=self.shards or f"{OUT}/shards")
        default = TrainConfig()
        changes: dict[str, Any] = {
            name: value
            for name, value in STAND_IN_RECIPE.items()
            if getattr(self.recipe, name) == getattr(default, name)
        }
        return replace(
            self,
            corpus=STAND_IN,
            shards=self.shards or f"{OUT}/stand-in-shards",
            recipe=replace(self.recipe, **changes),
        )


VERBS: dict[str, Callable[..., Common]] = {
    "pipeline": Pipeline,
    "prepare": Prepare,
    "train": Train,
    "evaluate": Evaluate,
    "predict": Predict,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0, 2 for an error of the user's, 130 for Ctrl-C."""
    try:
        verb = tyro.extras.subcommand_cli_from_dict(
            VERBS,
            args=arguments,
            prog="ser-ray",
            description="Speech emotion recognition at scale, on Ray and MLflow.",
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )
        verb = verb.resolved()
        if verb.dry_run:
            print(json.dumps({type(verb).__name__.lower(): dataclasses.asdict(verb)}, indent=2))
            return 0
        from ser_ray import commands

        commands.run(verb)
    except SerRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output is gone: nothing is left to say, and nowhere to say it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0
