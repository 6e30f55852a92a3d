"""Verbs that use a model: evaluate, predict, demo-ui, export and register."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

import tyro

from ser_ray import api
from ser_ray.cli.verb import Verb, VerbResult, say
from ser_ray.command import next_command
from ser_ray.errors import ConfigError
from ser_ray.features.config import Condition
from ser_ray.progress import stderr_console
from ser_ray.shards.config import TableConfig

if TYPE_CHECKING:
    from ser_ray.corpus.audio_files import AudioFiles
    from ser_ray.inference.predictor import Predictor

FEW_FILES = 48
"""Largest number of files that are predicted without Ray. Ray takes about ten seconds to start."""

Model = Annotated[
    str,
    tyro.conf.arg(
        metavar="MODEL",
        help="Folder or URI of a checkpoint or a run, a run's name or id, runs:/ID/model, or "
        "models:/NAME@ALIAS.",
    ),
]
Files = Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE ...", help_behavior_hint="")]


@dataclass(frozen=True, kw_only=True)
class ModelVerb(Verb):
    """Flags of every verb that uses a model."""

    tracking_uri: str = ""
    """MLflow store that holds the run or the registered model."""

    names: ClassVar[tuple[str, ...]] = ("model",)
    """Fields with the names of the models."""

    def check(self) -> None:
        """Check that the store exists if a model is looked up in it."""
        from ser_ray.tracking.database import require_database
        from ser_ray.tracking.store import model_location, resolve_uri

        models = [getattr(self, name) for name in self.names]
        if any(model and not model_location(model) for model in models):
            require_database(resolve_uri(self.tracking_uri))


@dataclass(frozen=True, kw_only=True)
class Evaluate(ModelVerb, TableConfig):
    """Score a model on the test part of its own fold, or on other speakers."""

    names = ("model", "against")

    model: tyro.conf.Positional[Model]
    shards: tuple[str, ...] = ()
    """Shard sets to evaluate on: those of the training, or shards of other speakers. The default is
    the training's shards at their recorded location, or in ser-ray-out. With --corpus, the default
    is a new folder in ser-ray-out."""
    label_map: str = ""
    """How labels are mapped: `usual`, `common` (clips are left out if the model does not know their
    label), or a CSV file, as in `train`. By default, the shards of the training are mapped as in
    the training, and other shards by `usual` if the model does not know all their labels."""
    corpus: str = ""
    """Corpus to evaluate on, as in `prepare --corpus`. It is first prepared with the model's
    feature settings, and written to --shards."""
    protocol: str = ""
    """Protocol whose fold is tested, instead of the model's own protocol."""
    fold: int | None = None
    """Fold to test, from 0, instead of the model's own fold."""
    under: tuple[Condition, ...] = ()
    """Also score the clips under simulated recording conditions: noise, a phone, a codec, the echo
    of a room, or a different loudness. The clips' files are decoded again."""
    against: str = ""
    """Another model to compare with, on the same clips and by paired tests."""
    allow_seen_speakers: bool = False
    """Also score speakers that the model was trained or validated on; the result names them."""
    audio: bool = True
    """The report contains the audio of the clips that it shows; `--no-audio` leaves the audio out
    of the report."""

    def resolved(self, flags: Sequence[str]) -> Self:
        """Fill in the default folder for the shards of `corpus`."""
        if self.shards or not self.corpus:
            return self
        from ser_ray.shards.corpora import corpus_name
        from ser_ray.storage.paths import absolute, short_digest

        digest = short_digest(f"{self.corpus} {self.model}")
        # Messages and label maps name the corpus by the last folder of its shards.
        corpus = absolute(self.corpus)
        name = corpus_name(corpus if "://" in corpus else str(Path(corpus).resolve()))
        return replace(self, shards=(f"{api.OUT}/scored-{digest}/{name}",))

    def run(self) -> VerbResult:
        """Prepare `corpus` if it is given, score the model, and compare it with `against`."""
        from ser_ray.tracking.views import run_links

        data_source = self.corpus or " ".join(self.shards) or "its own shards"
        say("model", f"scoring {self.model} on {data_source}")
        if self.corpus:
            summary = api.prepare_for(
                self.model,
                self.corpus,
                self.shards[0],
                missing=self.missing,
                columns=self.columns,
                label_map=self.label_map,
                tracking_uri=self.tracking_uri,
                address=self.common.address,
            )
            stderr_console().print(str(summary))
        evaluation = self._score(self.model, self.under)
        data, text = evaluation.to_dict(), str(evaluation)
        if self.against:
            comparison = api.compare(evaluation, self._score(self.against, ()))
            data["comparison"] = asdict(comparison)
            text += f"\nagainst {self.against}: {comparison}"
        command = next_command("predict", "FILE", model=self.model, tracking_uri=self.tracking_uri)
        next_step = f"report       {evaluation.report}\nuse it       {command}"
        if evaluation.is_recorded and (uri := evaluation.origin["tracking_uri"]).startswith("http"):
            run_id = evaluation.origin["run_id"]
            next_step = f"MLflow run   {run_id}: {run_links(uri, run_id).run}\n{next_step}"
        return VerbResult(data, text, next_step)

    def _score(self, model: str, under: tuple[Condition, ...]) -> "api.Evaluation":
        return api.evaluate(
            model,
            self.shards,
            label_map=self.label_map,
            protocol=self.protocol,
            fold=self.fold,
            allow_seen_speakers=self.allow_seen_speakers,
            under=under,
            audio=self.audio,
            tracking_uri=self.tracking_uri,
            address=self.common.address,
        )


@dataclass(frozen=True, kw_only=True)
class Predict(ModelVerb):
    """Predict the emotion in audio or video files.

    Up to 48 files are predicted without Ray. More files, or any number with `--output`, are
    predicted by a pool of model actors on Ray and written to a table. The same command then resumes
    an interrupted pass.
    """

    files: tyro.conf.Positional[Files]
    """Files, folders, URIs, or patterns like 'clips/**/*.wav'."""
    model: Model
    output: str = ""
    """Table to write, with one row for each file: .parquet, .csv or .jsonl. For more than 48 files,
    the default is ser-ray-out/predictions.parquet."""
    min_confidence: float = 0.0
    """Lowest probability of a predicted emotion, from 0 to 1. If all emotions of a file are less
    probable, the file gets the status `unsure` and no emotion. Probabilities are calibrated on
    validation clips."""

    @property
    def resumes(self) -> bool:  # type: ignore[override]
        """Whether the user named the table, so that the same command surely resumes the pass.

        More than 48 files also go to a table, but their number is known only when they are listed.
        """
        return bool(self.output)

    def run(self) -> VerbResult:
        """Predict the files in this process or on a cluster."""
        from ser_ray.corpus.audio_files import describe_left_out, list_audio
        from ser_ray.inference.prediction import Prediction, Predictions

        if not self.files:
            raise ConfigError(
                "no files given: give files, folders or patterns, as in ser-ray predict clip.wav "
                f"--model {self.model}"
            )
        listed = list_audio(self.files)
        if left_out := describe_left_out(listed.left_out):
            stderr_console().print(left_out)
        say("model", f"loading {self.model}")
        predictor = api.load_model(
            self.model, self.tracking_uri, min_confidence=self.min_confidence
        )
        if self.output or len(listed.files) > FEW_FILES:
            return self._run_batch(listed, predictor)
        predictions = Predictions(
            Prediction(path=path, status="unreadable", reason=listed.problems[path])
            if path in listed.problems
            else predictor.predict(path)
            for path in listed.files
        )
        text = str(predictions)
        if predictor.card.corpus == "synthetic":
            text += "\n(the model was trained on the synthetic corpus)"
        problem = problem_of(Counter(prediction.status for prediction in predictions))
        data = {"predictions": [asdict(prediction) for prediction in predictions]}
        return VerbResult(data, text, problem=problem)

    def _run_batch(self, listed: "AudioFiles", predictor: "Predictor") -> VerbResult:
        output = self.output or api.PREDICTIONS
        summary = api.predict_to_table(listed, predictor, output, address=self.common.address)
        return VerbResult(asdict(summary), str(summary), problem=problem_of(summary.counts))


def problem_of(counts: Mapping[str, int]) -> str:
    """Return why `predict` fails; empty if it succeeds.

    Args:
        counts: number of files by status.
    """
    from ser_ray.inference.prediction import UNREACHABLE, UNSURE

    if num_unreachable := counts.get(UNREACHABLE):
        return f"unreachable files: {num_unreachable}; the same command tries them again"
    return "" if {"ok", UNSURE} & counts.keys() else "none of these files could be scored"


@dataclass(frozen=True, kw_only=True)
class DemoUi(ModelVerb):
    """Serve a web page where people record or upload a clip and see the model's prediction."""

    model: tyro.conf.Positional[Model]
    host: str = "127.0.0.1"
    """Address to listen on: 127.0.0.1 for this machine alone, 0.0.0.0 for every machine that can
    connect to it."""
    port: int = 7860
    """Port to listen on; 0 chooses a free port."""

    def run(self) -> VerbResult:
        """Serve the page until Ctrl-C or a signal."""
        from ser_ray.evaluation.introduction import introduce
        from ser_ray.inference.demo import serve
        from ser_ray.inference.predictor import Predictor
        from ser_ray.tracking.registry import local_model

        say("model", f"loading {self.model}")
        with local_model(self.model, self.tracking_uri) as checkpoint:
            predictor = Predictor(checkpoint)
            about, examples = introduce(checkpoint, self.model)
        serve(predictor, about, examples, self.host, self.port)
        return VerbResult({"stopped": True}, "stopped")


@dataclass(frozen=True, kw_only=True)
class Export(ModelVerb):
    """Export a model as one file, which computes the probability of every label from a waveform."""

    model: tyro.conf.Positional[Model]
    format: Literal["onnx", "torch"] = "onnx"
    """`onnx`, or `torch` for an exported program of torch (.pt2)."""
    output: str = ""
    """File to write; the default is ser-ray-out/model.onnx or .pt2."""

    def run(self) -> VerbResult:
        """Export the model, and check that the file gives the same probabilities."""
        say("model", f"exporting {self.model} as {self.format}")
        exported = api.export(self.model, self.output, self.format, tracking_uri=self.tracking_uri)
        return VerbResult(asdict(exported), str(exported))


@dataclass(frozen=True, kw_only=True)
class Register(ModelVerb):
    """Register a run's model in MLflow, with its model card as description."""

    names = ("run_id",)

    run_id: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN_ID")]]
    """MLflow run of a training, a cross-validation or a search. For a cross-validation, the model
    of the best fold is registered. For a search, the model that `tune --refit` or `train --like`
    trained with the best recipe is registered."""
    name: str = "ser-ray"
    """Name of the registered model."""
    alias: str = "champion"
    """Alias of the new version, whose address is then models:/NAME@ALIAS."""

    def run(self) -> VerbResult:
        """Register the model, and print its card."""
        say("model", f"registering the model of run {self.run_id} as {self.name}")
        version, card = api.register(
            self.run_id, self.name, self.alias, tracking_uri=self.tracking_uri
        )
        model = f"models:/{self.name}" + (f"@{self.alias}" if self.alias else f"/{version}")
        data = {"name": self.name, "version": version, "alias": self.alias}
        command = next_command("predict", "FILE", model=model, tracking_uri=self.tracking_uri)
        text = f"{card}\nregistered   {model} (version {version})"
        return VerbResult(data, text, f"use it       {command}")
