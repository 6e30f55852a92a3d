"""The verb pipeline, which runs the verbs prepare, train, evaluate and predict in order."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from ser_ray import api
from ser_ray.cli.data import Prepare
from ser_ray.cli.model import Predict
from ser_ray.cli.parsing import parse_over
from ser_ray.cli.train import Train
from ser_ray.cli.verb import Verb, VerbResult, say
from ser_ray.command import next_command
from ser_ray.distributed.run_config import RunConfig
from ser_ray.errors import ConfigError, ShardsError
from ser_ray.features.config import KINDS, FeatureConfig
from ser_ray.progress import stderr_console
from ser_ray.shards.config import PrepareConfig, TableConfig, column_names
from ser_ray.training.recipe import AugmentConfig, TrainConfig

SYNTHETIC = f"{api.OUT}/synthetic"
"""Folder of the synthetic corpus, which is the default corpus."""
SYNTHETIC_RECIPE = TrainConfig(
    weights="none",
    validation_speakers=4,
    crop_frames=64,
    epochs=24,
    batch_size=16,
    augment=AugmentConfig(noise=0.0, echo=0.0, band_limit=0.0),
)
"""Default recipe for the synthetic corpus, which is too small for noise, echo and band limits."""
SHOWN_PREDICTIONS = 8
"""Largest number of test clips that are predicted and printed."""


@dataclass(frozen=True, kw_only=True)
class Pipeline(Verb, TableConfig):
    """Run every step in order: prepare, train, evaluate, predict."""

    corpus: str = ""
    """Folder or URI of RAVDESS, or a table of your own recordings. By default, a small synthetic
    corpus is made, and a short training without pretrained weights runs on it."""
    shards: str = ""
    """Folder or URI to write the shards to. The default is `ser-ray-out/shards`, or
    `ser-ray-out/synthetic-shards` for the synthetic corpus."""
    features: FeatureConfig = field(default_factory=FeatureConfig)
    recipe: TrainConfig = field(default_factory=TrainConfig)
    run_config: RunConfig = field(default_factory=RunConfig)
    resumes = True

    def resolved(self, flags: Sequence[str]) -> Self:
        """Fill in the folder of the shards and, if there is no corpus, the synthetic one."""
        if self.corpus:
            return replace(self, shards=self.shards or api.SHARDS)
        verb = parse_over(flags, type(self)(recipe=SYNTHETIC_RECIPE))
        return replace(verb, corpus=SYNTHETIC, shards=self.shards or api.SYNTHETIC_SHARDS)

    def place(self) -> str:
        """Return whether the training runs on Ray or in this process."""
        return self._train().place()

    def run(self) -> VerbResult:
        """Run all steps in order. If the training needs Ray, all steps share one connection."""
        from ser_ray.cluster.connect import cluster, needs_ray
        from ser_ray.corpus.synthetic import make_synthetic_corpus

        self._check_inputs()
        if self.corpus == SYNTHETIC:
            say("corpus", f"no --corpus: making the synthetic corpus in {self.corpus}")
            make_synthetic_corpus(Path(self.corpus))
        config = PrepareConfig(
            corpus=self.corpus,
            shards=self.shards,
            missing=self.missing,
            columns=self.columns,
            features=self.features,
        )
        address, workers = self.common.address, self.run_config.worker_range[1]
        with cluster(address) if needs_ray(address, workers) else nullcontext():
            prepared = Prepare(prepare=config).run()
            stderr_console().print(prepared.text)
            trained = self._train().run()
            model = trained.data["checkpoint"]
            say("model", f"scoring {model} on {self.shards}")
            evaluation = api.evaluate(model, (self.shards,), audio=self.run_config.audio)
            data = {"prepare": prepared.data, "train": trained.data}
            data["evaluate"] = evaluation.to_dict()
            problem, lines = trained.problem, [""]
            if truth := choose_files(evaluation):  # empty if no clip is a complete file
                predicted = Predict(files=tuple(truth), model=model).run()
                data["predict"], problem = predicted.data, problem or predicted.problem
                lines += [*prediction_lines(truth, predicted.data["predictions"]), ""]
        lines += [f"test         {evaluation}", trained.text]
        next_step = f"try it       {next_command('demo-ui', model)}"
        return VerbResult(data, "\n".join(lines), next_step, problem)

    def _check_inputs(self) -> None:
        """Report a wrong location or setting before anything slow starts."""
        import pyarrow.compute as pc

        from ser_ray.corpus.folds import ALL, num_folds
        from ser_ray.corpus.labels import map_labels
        from ser_ray.corpus.manifest import list_corpus
        from ser_ray.corpus.ravdess.names import EMOTIONS
        from ser_ray.shards.corpora import corpus_name
        from ser_ray.tracking.registry import read_weights

        if self.recipe.protocol == ALL:
            raise ConfigError(
                f"protocol is {ALL}, which has no test part to score: run `ser-ray prepare` and "
                f"`ser-ray train --protocol {ALL}` instead"
            )
        if (feature := self.recipe.feature) not in KINDS:
            try:
                api.open_shards(self.shards).card.encoder_of(feature)
            except ShardsError:
                raise ConfigError(
                    f"feature is {feature}: pipeline prepares {', '.join(KINDS)}; for an encoder, "
                    f"run `ser-ray prepare --encoder {feature}` first"
                ) from None
        labels: tuple[str, ...] = EMOTIONS
        if self.corpus != SYNTHETIC:
            listed = list_corpus(self.corpus, self.missing, column_names(self.columns))
            say("corpus", f"{self.corpus}: {len(listed.manifest)} files or segments")
            labels = listed.labels
            to_decode = listed.manifest.filter(pc.is_null(listed.manifest["status"]))
            if to_decode.num_rows:
                num_folds(self.recipe.protocol, to_decode)
            map_labels({corpus_name(self.shards): labels}, self.recipe.label_map)
        read_weights(self.recipe.weights, labels, self.run_config.tracking_uri)

    def _train(self) -> Train:
        return Train(
            common=self.common,
            shards=(self.shards,),
            recipe=self.recipe,
            run_config=self.run_config,
        )


def choose_files(evaluation: "api.Evaluation") -> dict[str, str]:
    """Choose up to `SHOWN_PREDICTIONS` test clips that are complete files: {path: true emotion}."""
    from ser_ray.storage.packed import ROW

    clips = evaluation.predictions.select(["path", "emotion", "start"]).to_pylist()
    files = [clip for clip in clips if clip["start"] is None and ROW not in clip["path"]]
    chosen = files[:: max(len(files) // SHOWN_PREDICTIONS, 1)][:SHOWN_PREDICTIONS]
    return {clip["path"]: clip["emotion"] for clip in chosen}


def prediction_lines(
    truth: Mapping[str, str], predictions: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Return a heading, and a line for each clip with its true and its predicted emotion.

    Args:
        truth: {path: true emotion}.
        predictions: `path`, `status`, `emotion` and `probabilities` of every clip.
    """
    lines = ["test clips   true       predicted"]
    for prediction in predictions:
        path, emotion = prediction["path"], prediction["emotion"] or ""
        mark = "right" if emotion == truth[path] else "WRONG"
        detail = f"{prediction['probabilities'][emotion]:4.0%}" if emotion else prediction["status"]
        lines.append(f"  {mark}      {truth[path]:9}  {emotion:9} {detail}  {Path(path).name}")
    return lines
