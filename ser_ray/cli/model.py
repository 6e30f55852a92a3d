"""Verbs that use a model: evaluate, predict, demo-ui, export and register."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal, Self

import tyro

from ser_ray import api
from ser_ray.cli.verb import Outcome, TableVerb, Verb, say
from ser_ray.command import next_command
from ser_ray.errors import ConfigError
from ser_ray.features.config import Condition
from ser_ray.progress import stderr_console

if TYPE_CHECKING:
    from ser_ray.corpus.audio_files import AudioFiles
    from ser_ray.inference.predictor import Predictor

FEW_FILES = 48
"""More files are predicted by a pass of Ray Data, which takes about ten seconds to start."""
NOTHING_SCORED = "none of these files could be scored"

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
    """MLflow store with the run or the registered model."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(ModelVerb, TableVerb):
    """Score a trained model on the test part of its own fold."""

    model: tyro.conf.Positional[Model]
    shards: tuple[str, ...] = ()
    """Shard sets to score: those of the training, or shards of other speakers. By default, the
    shards of the training are looked for. With --corpus, a folder in ser-ray-out is the default."""
    label_map: str = ""
    """How labels are mapped: usual, common (without labels that the model does not know), or a CSV
    file, as in `train`. The default is usual if the model does not know all labels of the
    shards."""
    corpus: str = ""
    """Corpus to score, as in `prepare --corpus`. It is first prepared into the shard set, with the
    features that the model was trained on."""
    protocol: str = ""
    """Score the test part of a fold of this protocol, instead of the model's own protocol."""
    fold: int | None = None
    """Score this fold instead of the model's own fold; folds are numbered from 0."""
    under: tuple[Condition, ...] = ()
    """Also score the clips under simulated recording conditions: noise, a phone, a codec, a room
    with an echo, another level. The clips' files are decoded again."""
    against: str = ""
    """Another model to compare with on the same clips, by paired tests."""
    allow_seen_speakers: bool = False
    """Also score speakers that the model was trained on; the result names them."""
    audio: bool = True
    """Put the sound of the clips that the report shows into the report; `--no-audio` leaves it
    out."""

    def resolved(self, flags: Sequence[str]) -> Self:
        """Fill in the folder for the shards of a corpus."""
        if self.shards or not self.corpus:
            return self
        digest = hashlib.sha256(f"{self.corpus} {self.model}".encode()).hexdigest()[:8]
        return replace(self, shards=(f"{api.OUT}/scored-{digest}",))

    def run(self) -> Outcome:
        """Prepare the corpus if there is one, score the model, and compare it with `against`."""
        scored = self.corpus or " ".join(self.shards) or "its own shards"
        say("model", f"scoring {self.model} on {scored}")
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
        after = f"use it       {command}"
        if evaluation.report:
            after = f"report       {evaluation.report}\n{after}"
        return Outcome(data, text, after)

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

    Up to 48 files are predicted without Ray. More files, or any files with `--output`, are
    predicted by a pool of model actors and written to a table. The same command resumes an
    interrupted pass.
    """

    files: tyro.conf.Positional[Files]
    """Files, folders, URIs, or patterns like 'clips/**/*.wav'."""
    model: Model
    output: str = ""
    """Table to write, with one row per file: .parquet, .csv or .jsonl. For more than 48 files, the
    default is ser-ray-out/predictions.parquet."""
    min_confidence: float = 0.0
    """A file is unsure, and gets no emotion, if its most probable emotion has a lower probability
    than this (0 to 1). Probabilities are calibrated on validation clips."""

    def run(self) -> Outcome:
        """Predict the files in this process or on a cluster."""
        from ser_ray.corpus.audio_files import describe_left_out, list_audio
        from ser_ray.inference.prediction import Prediction, Predictions

        if not self.files:
            raise ConfigError(
                "no files: name files, folders or patterns, as in ser-ray predict clip.wav "
                f"--model {self.model}"
            )
        listed = list_audio(self.files)
        if left_out := describe_left_out(listed.left_out):
            stderr_console().print(left_out, markup=False)
        say("model", f"loading {self.model}")
        confidence = self.min_confidence
        predictor = api.load_model(self.model, self.tracking_uri, min_confidence=confidence)
        if self.output or len(listed.files) > FEW_FILES:
            return self._run_batch(listed, predictor)
        found = Predictions(
            Prediction(path=path, status="unreadable", reason=listed.problems[path])
            if path in listed.problems
            else predictor.predict(path)
            for path in listed.files
        )
        text = str(found)
        if predictor.card.corpus == "synthetic":
            text += "\n(the model was trained on the synthetic corpus)"
        problem = "" if any(item.probabilities for item in found) else NOTHING_SCORED
        return Outcome({"predictions": [asdict(item) for item in found]}, text, problem=problem)

    def _run_batch(self, listed: "AudioFiles", predictor: "Predictor") -> Outcome:
        from ser_ray.inference.prediction import UNSURE
        from ser_ray.inference.recordings import UNREACHABLE

        output = self.output or api.PREDICTIONS
        summary = api.predict_to_table(listed, predictor, output, address=self.common.address)
        problem = "" if {"ok", UNSURE} & summary.counts.keys() else NOTHING_SCORED
        if missing := summary.counts.get(UNREACHABLE):
            problem = f"{missing} files were unreachable; the same command tries them again"
        return Outcome(asdict(summary), str(summary), problem=problem)


@dataclass(frozen=True, kw_only=True)
class DemoUi(ModelVerb):
    """Serve a web page where people record or upload a clip and see the model's prediction."""

    model: tyro.conf.Positional[Model]
    host: str = "127.0.0.1"
    """Address to listen on. 127.0.0.1 serves only this machine; 0.0.0.0 serves every machine that
    can connect to this machine."""
    port: int = 7860
    """Port to listen on; 0 takes a free port."""

    def run(self) -> Outcome:
        """Serve the page until Ctrl-C."""
        from ser_ray.evaluation.introduction import introduce
        from ser_ray.inference.demo import serve
        from ser_ray.inference.predictor import Predictor
        from ser_ray.tracking.registry import local_model

        with local_model(self.model, self.tracking_uri) as checkpoint:
            predictor = Predictor(checkpoint)
            about, examples = introduce(checkpoint, self.model)
        serve(predictor, about, examples, self.host, self.port)
        return Outcome({"stopped": True}, "stopped")


@dataclass(frozen=True, kw_only=True)
class Export(ModelVerb):
    """Write a model as one file, which turns a waveform at its sample rate into probabilities."""

    model: tyro.conf.Positional[Model]
    format: Literal["onnx", "torch"] = "onnx"
    """ONNX, or torch's exported program (.pt2)."""
    output: str = ""
    """File to write; the default is ser-ray-out/model.onnx or .pt2."""

    def run(self) -> Outcome:
        """Export the model and check its probabilities."""
        exported = api.export(self.model, self.output, self.format, tracking_uri=self.tracking_uri)
        return Outcome(asdict(exported), str(exported))


@dataclass(frozen=True, kw_only=True)
class Register(ModelVerb):
    """Register a run's model in MLflow, with its model card as description."""

    run_id: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN_ID")]]
    """MLflow run of a training, a cross-validation or a search. Of a cross-validation, the best
    fold is registered. Of a search, the training of the best recipe by `tune --refit` or
    `train --like` is registered."""
    name: str = "ser-ray"
    """Name of the registered model."""
    alias: str = "champion"
    """Alias of the new version, which then has the address models:/NAME@ALIAS."""

    def run(self) -> Outcome:
        """Register the model and print its card."""
        version, card = api.register(
            self.run_id, self.name, self.alias, tracking_uri=self.tracking_uri
        )
        model = f"models:/{self.name}" + (f"@{self.alias}" if self.alias else f"/{version}")
        data = {"name": self.name, "version": version, "alias": self.alias}
        command = next_command("predict", "FILE", model=model, tracking_uri=self.tracking_uri)
        text = f"{card}\nregistered   {model} (version {version})"
        return Outcome(data, text, f"use it       {command}")
