"""`ser-ray <verb>`: the command line.

Every verb is a dataclass below, made of the same configuration dataclasses that the functions take,
so a flag is a field and its help the field's description. Nothing heavy is imported before a verb
runs. `jobs/*.py` are these verbs for `ray job submit`.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self, TypeVar

import tyro

from ser_ray.corpus.download import DownloadConfig
from ser_ray.distributed.config import RunConfig
from ser_ray.features.config import FeatureConfig
from ser_ray.search.space import CrossvalConfig, SlotConfig, TuneConfig
from ser_ray.shards.config import PrepareConfig
from ser_ray.training.config import LrRangeConfig, TrainConfig

OUT = "ser-ray-out"
SYNTHETIC = f"{OUT}/synthetic"
"""Where a pipeline without a corpus makes one."""
SYNTHETIC_RECIPE = TrainConfig(
    weights="none",
    validation_speakers=4,
    crop_frames=64,
    epochs=24,
    batch_size=16,
)
"""The recipe on it, where the user gives no other."""


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every verb takes."""

    address: str = ""
    """Ray cluster to join; RAY_ADDRESS, the surrounding job's, or this machine alone if empty."""
    json: bool = False
    """Print the result as JSON on standard output; progress stays on standard error."""
    dry_run: bool = False
    """Print the resolved configuration and stop."""

    def resolved(self, flags: Sequence[str]) -> Self:
        """The verb with everything that follows from its other settings filled in.

        Args:
            flags: what stood behind the verb's name.
        """
        return self


@dataclass(frozen=True, kw_only=True)
class Download(Common):
    """Fetch RAVDESS from its Zenodo record; what is there already is not asked for again."""

    download: DownloadConfig = field(default_factory=DownloadConfig)


@dataclass(frozen=True, kw_only=True)
class Prepare(Common):
    """Decode a corpus into Parquet shards of features."""

    prepare: PrepareConfig


@dataclass(frozen=True, kw_only=True)
class Train(Common):
    """Train one fold; the same command goes on where it was interrupted."""

    shards: str = f"{OUT}/shards"
    """Folder or URI of the shard set that `prepare` wrote."""
    like: str = ""
    """MLflow run whose recipe is taken, of a training, a search or one of its trials; what is given
    besides replaces single settings of it."""
    recipe: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def resolved(self, flags: Sequence[str]) -> Self:
        """Fill in the recipe of the run that this one is to be like."""
        if not self.like:
            return self
        from ser_ray.tracking.tracker import name_like, recipe_of_run

        theirs = TrainConfig.from_dict(recipe_of_run(self.like, self.run.tracking_uri))
        name = self.run.name or name_like(self.like)
        verb = _parse_again(flags, type(self)(recipe=theirs))
        return replace(verb, run=replace(self.run, name=name))


@dataclass(frozen=True, kw_only=True)
class LrRange(Common):
    """Propose the two bounds of the learning rate by a range test (Smith 2015)."""

    shards: str = f"{OUT}/shards"
    """Folder or URI of the shard set that `prepare` wrote."""
    test: LrRangeConfig = field(default_factory=LrRangeConfig)
    recipe: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True, kw_only=True)
class Tune(Common):
    """Search for the best recipe; the same command goes on where it was interrupted."""

    shards: str = f"{OUT}/shards"
    """Folder or URI of the shard set that `prepare` wrote; one serves all feature kinds."""
    search: TuneConfig = field(default_factory=TuneConfig)
    slots: SlotConfig = field(default_factory=SlotConfig)
    recipe: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True, kw_only=True)
class Crossval(Common):
    """Train and test every fold of a protocol; the same command goes on where it stopped."""

    shards: str = f"{OUT}/shards"
    """Folder or URI of the shard set that `prepare` wrote."""
    crossval: CrossvalConfig = field(default_factory=CrossvalConfig)
    slots: SlotConfig = field(default_factory=SlotConfig)
    recipe: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True, kw_only=True)
class Evaluate(Common):
    """Score a trained model on the test part of its own fold."""

    model: tyro.conf.Positional[str]
    """Checkpoint folder or URI that `train` printed, MLflow run id, or models:/name@alias."""
    shards: str = ""
    """The shard set it was trained on, or another of speakers it has not heard. If empty,
    ser-ray-out/shards, or with --corpus a folder of its own in ser-ray-out."""
    corpus: str = ""
    """Corpus to score, as prepare takes it: prepared into the shard set first, with the model's own
    features."""
    protocol: str = ""
    """Score the test part of this protocol's fold instead of the one it was trained for."""
    fold: int | None = None
    """Fold to score instead of its own, from 0."""
    against: str = ""
    """Another model to compare with on the same clips, by paired tests."""
    allow_seen_speakers: bool = False
    """Score speakers that the model was trained on all the same; the result says so."""
    audio: bool = True
    """Put the sound of the clips that the report shows into it."""
    tracking_uri: str = ""
    """MLflow store in which a run id or a registered name is looked up."""

    def resolved(self, flags: Sequence[str]) -> Self:
        """The verb with the place of its shards."""
        if self.shards:
            return self
        digest = hashlib.sha256(f"{self.corpus} {self.model}".encode()).hexdigest()[:8]
        return replace(self, shards=f"{OUT}/{f'scored-{digest}' if self.corpus else 'shards'}")


@dataclass(frozen=True, kw_only=True)
class Predict(Common):
    """Name the emotion in audio or video files.

    Few files are answered at once, without Ray. Many, or any with `--output`, go through a pool of
    model actors into a table; interrupted, the same command goes on.
    """

    files: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders, URIs, or patterns like 'clips/**/*.wav'."""
    model: str
    """Checkpoint folder or URI that `train` printed, MLflow run id, or models:/name@alias."""
    output: str = ""
    """Table to write, .parquet, .csv or .jsonl, one row a file. Of more than 48 files it is
    ser-ray-out/predictions.parquet if nothing is said."""
    tracking_uri: str = ""
    """MLflow store in which a run id or a registered name is looked up."""


@dataclass(frozen=True, kw_only=True)
class DemoUi(Common):
    """Serve a page where people record or drop a clip and see what the model says of it."""

    model: tyro.conf.Positional[str]
    """Checkpoint folder or URI that `train` printed, MLflow run id, or models:/name@alias."""
    host: str = "127.0.0.1"
    """Address to listen on: of this machine alone, or 0.0.0.0 for everybody who can reach it."""
    port: int = 7860
    """Port to listen on; 0 takes a free one."""
    tracking_uri: str = ""
    """MLflow store in which a run id or a registered name is looked up."""


@dataclass(frozen=True, kw_only=True)
class Export(Common):
    """Write a model as one file: waveform at its sample rate in, probabilities out."""

    model: tyro.conf.Positional[str]
    """Checkpoint folder or URI that `train` printed, MLflow run id, or models:/name@alias."""
    format: Literal["onnx", "torch"] = "onnx"
    """ONNX, or torch's exported program (.pt2)."""
    output: str = ""
    """File to write; ser-ray-out/model.onnx or .pt2 if empty."""
    tracking_uri: str = ""
    """MLflow store in which a run id or a registered name is looked up."""


@dataclass(frozen=True, kw_only=True)
class Register(Common):
    """Make a run's model a registered version, with what one must know of it."""

    run_id: tyro.conf.Positional[str]
    """MLflow run of a training, of a cross-validation, whose best fold's model is taken, or of a
    search: then what `tune --refit` or `train --like` made of its best trial is taken."""
    name: str = "ser-ray"
    """Registered model."""
    alias: str = "champion"
    """Alias that the version gets; models:/NAME@ALIAS then names it."""
    tracking_uri: str = ""
    """MLflow store of the run and the registry."""


@dataclass(frozen=True, kw_only=True)
class Pipeline(Common):
    """The whole way: prepare, train, evaluate, predict."""

    corpus: str = ""
    """RAVDESS folder or URI, or a table of an own corpus. Without it a small synthetic
    corpus is made and a short recipe without pretrained weights is used on it."""
    shards: str = ""
    """Where the shards go; `ser-ray-out/shards`, or `ser-ray-out/synthetic-shards`, if empty."""
    features: FeatureConfig = field(default_factory=FeatureConfig)
    recipe: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def resolved(self, flags: Sequence[str]) -> Self:
        """Fill in where the shards go and, without a corpus, the synthetic and its recipe."""
        if self.corpus:
            return replace(self, shards=self.shards or f"{OUT}/shards")
        verb = _parse_again(flags, type(self)(recipe=SYNTHETIC_RECIPE))
        return replace(verb, corpus=SYNTHETIC, shards=self.shards or f"{OUT}/synthetic-shards")


VERBS: dict[str, Callable[..., Common]] = {
    "pipeline": Pipeline,
    "download": Download,
    "prepare": Prepare,
    "train": Train,
    "lr-range": LrRange,
    "tune": Tune,
    "crossval": Crossval,
    "evaluate": Evaluate,
    "predict": Predict,
    "demo-ui": DemoUi,
    "export": Export,
    "register": Register,
}


TYRO = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
V = TypeVar("V", bound=Common)


def _parse_again(flags: Sequence[str], default: V) -> V:
    """Parse a verb's flags on other defaults; one that says what its own default is counts too."""
    # Without FlagCreatePairsOff, a switch that is on by default may be given all the same.
    config = (tyro.conf.OmitArgPrefixes,)
    return tyro.cli(type(default), args=flags, default=default, prog="ser-ray", config=config)
