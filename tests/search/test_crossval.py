import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient
from pyarrow import fs

from ser_ray.api import recipe_like
from ser_ray.cli.train import Crossval
from ser_ray.distributed.run_config import RunConfig
from ser_ray.distributed.run_folder import RunFolder
from ser_ray.distributed.train import train
from ser_ray.errors import CheckpointError, ConfigError, SerRayError
from ser_ray.evaluation import robustness
from ser_ray.evaluation.evaluate import evaluate
from ser_ray.evaluation.evaluation import SCORES
from ser_ray.evaluation.rendering import as_artifact
from ser_ray.evaluation.to_mlflow import register
from ser_ray.search import crossval as module
from ser_ray.search.config import CrossvalConfig, SlotConfig
from ser_ray.search.crossval import (
    crossval,
    crossval_name,
    plan_crossval,
    require_none_failed,
)
from ser_ray.search.crossval_result import CrossvalPlan, CrossvalResult, ensemble_scores, pool
from ser_ray.search.fold_files import fold_folder, read_fold
from ser_ray.search.trial import TrialRecord
from ser_ray.shards.read import open_shards
from ser_ray.storage.paths import filesystem_of
from ser_ray.tracking.registry import best_training_of
from ser_ray.training.checkpoint import local_checkpoint
from ser_ray.training.data import label_indices
from ser_ray.training.loop import MakeSnapshot, fit
from ser_ray.training.metrics import scores_of
from ser_ray.training.model import Pretrained
from ser_ray.training.parts import select_rows
from ser_ray.training.recipe import AugmentConfig, TrainConfig
from ser_ray.training.trainer import EpochReport
from tests.conftest import make_memory_shards
from tests.mlflow_store import new_store
from tests.models import make_checkpoint
from tests.s3_server import s3_bucket
from tests.shard_files import write_shard_files

RECIPE = TrainConfig(
    protocol="speaker-2", weights="none", crop_frames=24, batch_size=8, epochs=2, lr_max=4e-3,
    augment=AugmentConfig(noise=0, echo=0, band_limit=0, time_mask_frames=4),
)  # fmt: skip
SEEDS = CrossvalConfig(seeds=2)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*")
def test_every_clip_is_tested_once_with_each_seed_by_the_fold_that_held_it_out(
    two_cpus, shards, tmp_path, monkeypatch
):
    run = RunConfig(storage=str(tmp_path / "runs"), tracking_uri=new_store(tmp_path))
    plan = plan_crossval(shards, RECIPE, SEEDS)
    result = crossval(plan, run, SlotConfig(), show=lambda trials: None)
    again = crossval(
        plan_crossval(shards, RECIPE, SEEDS), run, SlotConfig(), show=lambda trials: None
    )
    assert again.to_dict() == result.to_dict()  # a finished cross-validation is not repeated
    assert again.run_id == result.run_id

    clips = open_shards(shards).clips()
    kept = pq.read_table(tmp_path / "runs" / result.name / "predictions.parquet")
    for seed in (0, 1):
        mine = kept.filter(np.equal(kept["seed"].to_numpy(), seed))
        assert sorted(mine["take"].to_pylist()) == sorted(clips["take"].to_pylist())
    of_fold = {
        fold: set(kept.filter(np.equal(kept["fold"].to_numpy(), fold))["speaker"].to_pylist())
        for fold in (0, 1)
    }
    assert of_fold[0] & of_fold[1] == set()

    right = np.equal(kept["emotion"].to_pylist(), kept["predicted"].to_pylist())
    seeds = kept["seed"].to_numpy()
    by_hand = [right[seeds == seed].mean() for seed in (0, 1)]
    assert result.pooled.mean("wa") == pytest.approx(np.mean(by_hand))
    assert result.spread("wa") == pytest.approx(np.std(by_hand, ddof=1))
    assert result.pooled.scores.confusion.sum() == len(kept)
    assert (
        result.pooled.intervals.wa[0] <= result.pooled.mean("wa") <= result.pooled.intervals.wa[1]
    )
    check_fold_against_plain_torch(shards, kept, tmp_path)
    check_runs(result, shards, run.tracking_uri)
    check_model_to_ship(result, shards, run)
    check_conditions(result, shards, run, monkeypatch)


@pytest.mark.ray
@pytest.mark.slow
def test_failed_folds_are_trained_again_by_a_driver_elsewhere(two_cpus, in_tmp, monkeypatch):
    """The storage is a bucket whose URI has a query; the second driver has another directory."""
    memory = make_memory_shards(num_frames=26)
    shards = Path(write_shard_files(in_tmp / "shards", memory, ("mel",)))
    seen: dict[str, str] = {}

    def hide_the_shards(trials: list[TrialRecord]) -> None:
        if any(trial.state == "running" for trial in trials) and shards.exists():
            shards.rename(in_tmp / "hidden")

    def remember(trials: list[TrialRecord]) -> None:
        seen.update({trial.trial_id: trial.state for trial in trials})

    with s3_bucket("ser-ray-folds") as uri:
        run = RunConfig(
            storage=uri.format("runs"), tracking_uri=new_store(in_tmp),
            max_failures=0,
        )  # fmt: skip
        config, slots = CrossvalConfig(), SlotConfig()
        plan = plan_crossval("shards", RECIPE, config)
        with pytest.raises(SerRayError, match=r"2 of 2 trainings failed.*The same command trains"):
            crossval(plan, run, slots, show=hide_the_shards)
        (in_tmp / "hidden").rename(shards)
        (in_tmp / "elsewhere").mkdir()
        monkeypatch.chdir(in_tmp / "elsewhere")
        plan = plan_crossval(str(shards), RECIPE, config)
        result = crossval(plan, run, slots, show=remember)
        assert sorted(seen.values()) == ["finished", "finished"]
        filesystem, path = filesystem_of(result.table)
        kept = pq.read_table(path, filesystem=filesystem)
        filesystem, path = filesystem_of(fold_folder(result.location, replace(RECIPE, fold=1)))
        names = {Path(f.path).name for f in filesystem.get_file_info(fs.FileSelector(path))}
    assert sorted(kept["take"].to_pylist()) == sorted(memory.table["take"].to_pylist())
    assert names == {"card.json", "model.safetensors", "predictions.parquet"}


def test_locations_inside_a_folder_keep_the_query_of_its_uri():
    folder = RunFolder("s3://b/runs?region=us-east-1", "cv")
    assert folder.location == "s3://b/runs/cv?region=us-east-1"
    assert filesystem_of(folder.location)[1] == folder.path == "b/runs/cv"
    place = fold_folder(folder.location, replace(RECIPE, fold=1, seed=2))
    assert place == "s3://b/runs/cv/models/fold1-seed2?region=us-east-1"
    assert filesystem_of(place)[1] == "b/runs/cv/models/fold1-seed2"


def test_a_finished_fold_whose_files_were_deleted_is_an_error_that_names_the_folder(tmp_path):
    trial = TrialRecord("a", 1, {}, RECIPE, state="finished")
    with pytest.raises(CheckpointError, match=r"cv/models/fold0-seed0: .* missing .* --name"):
        read_fold("test", str(tmp_path / "cv"), trial, "sqlite:///here")


@pytest.mark.parametrize("card", ["", "[]", "{}", '{"schema_version": 1}'])
def test_a_finished_fold_with_a_damaged_card_is_the_same_error(tmp_path, card):
    folder = tmp_path / "cv" / "models" / "fold0-seed0"
    folder.mkdir(parents=True)
    (folder / "card.json").write_text(card)
    trial = TrialRecord("a", 1, {}, RECIPE, state="finished")
    with pytest.raises(CheckpointError):
        read_fold("test", str(tmp_path / "cv"), trial, "sqlite:///here")


def test_the_error_about_a_failed_fold_names_it_and_the_way_out():
    trial = TrialRecord("a", 1, {}, replace(RECIPE, fold=3, seed=2), state="failed", problem="full")
    with pytest.raises(
        SerRayError,
        match=r"1 of 1 trainings failed.*fold 3, seed 2: full\. The same command trains .* again",
    ):
        require_none_failed([trial])


def pooled(folder: Path) -> CrossvalResult:
    """Pool two folds with two seeds; with each seed three of four clips are right."""
    card = make_checkpoint(folder / "any", labels=("calm", "sad"))
    shards: Any = SimpleNamespace(card=SimpleNamespace(labels=("calm", "sad"), corpus="table"))
    plan = CrossvalPlan(shards, RECIPE, SEEDS, (0, 1), "speaker-2, 2 folds")
    trials, row = [], {"epoch": 1.0, "val/ua": 0.5, "val/loss": 1.0}
    for point in plan.points:
        seed, fold = point["seed"], point["fold"]
        recipe = replace(RECIPE, seed=seed, fold=fold)
        rows = {
            "path": [f"{fold}0.wav", f"{fold}1.wav"], "start": pa.nulls(2, pa.float64()),
            "fold": [fold] * 2, "seed": [seed] * 2, "speaker": [f"{fold}a", f"{fold}b"],
            "emotion": ["calm", "sad"], "predicted": ["calm", "calm" if fold else "sad"],
            "p_calm": [0.9, 0.9 if fold else 0.1], "p_sad": [0.1, 0.1 if fold else 0.9],
        }  # fmt: skip
        place = Path(fold_folder(str(folder), recipe))
        place.mkdir(parents=True)
        of_fold = replace(card, temperature=2.0 if fold else 0.5)
        (place / "card.json").write_text(of_fold.to_json())
        pq.write_table(pa.table(rows), place / "predictions.parquet")
        trials.append(TrialRecord("a", 1, point, recipe, rows=[row], state="finished"))
    tracker: Any = SimpleNamespace(run_id="abc", uri="http://host:5000")
    return pool(plan, trials, str(folder), "cv", tracker)


def test_the_text_has_the_label_beside_every_number(tmp_path):
    first, *lines = str(pooled(tmp_path)).splitlines()[3:-2]
    assert first == "fold 1, seed 1 test UA 50.0%, WA 50.0%, 2 clips"
    assert len(lines) == len(SCORES) + 1
    assert all(line.endswith("(speaker-2, 2 folds, a custom corpus)") for line in lines)
    assert all("± 0.0% over seeds, 95 % interval over" in line for line in lines[:-1])
    assert [line.split()[:2] for line in lines[:2]] == [["UA", "75.0%"], ["WA", "75.0%"]]
    assert lines[-1].startswith("ensemble  UA 75.0%, WA 75.0%, macro F1 ")
    assert "mean probability of 2 networks, not a single network" in lines[-1]


def test_calibration_before_scaling_is_computed_without_the_temperature_of_each_fold(tmp_path):
    found = pooled(tmp_path).pooled.to_dict()
    assert found["ece"] == pytest.approx(0.9 - 0.75)
    # Fold 0 is right in 2 of 2 clips: 0.9^0.5 / (0.9^0.5 + 0.1^0.5) = 0.75. Fold 1 is right in 1 of
    # 2 clips: 0.9^2 / (0.9^2 + 0.1^2) = 81 / 82.
    assert found["ece_uncalibrated"] == pytest.approx(((1 - 0.75) + (81 / 82 - 0.5)) / 2)


def test_the_order_of_rows_does_not_change_the_mean_that_an_ensemble_is_scored_by():
    paths, seeds = ["b", "a", "a", "b"], np.array([3, 3, 4, 4])
    truth = np.array([1, 0, 0, 1])
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.1, 0.9], [0.0, 1.0]])
    # a: (0.6 + 0.1) / 2 for label 0, wrong; b: (0.1 + 1.0) / 2 for label 1, right.
    scores = ensemble_scores(paths, seeds, truth, probabilities)
    assert scores is not None
    assert scores.confusion.tolist() == [[0, 1], [0, 1]]
    assert scores.loss == pytest.approx(-np.mean(np.log([0.35, 0.55])))
    assert ensemble_scores(["a", "b", "a", "c"], seeds, truth, probabilities) is None
    assert ensemble_scores(paths, np.array([3, 4, 4, 4]), truth, probabilities) is None
    assert ensemble_scores(paths[:2], seeds[:2], truth[:2], probabilities[:2]) is None


def test_the_verb_prints_the_figures_and_where_the_table_is(shards, tmp_path, monkeypatch):
    result = replace(pooled(tmp_path), location="s3://b/runs/cv?region=x")
    given: list[CrossvalPlan | RunConfig | SlotConfig] = []

    def remember(plan: CrossvalPlan, run: RunConfig, slots: SlotConfig, **_: object) -> object:
        given.extend((plan, run, slots))
        return result

    monkeypatch.setattr(module, "crossval", remember)
    verb = Crossval(
        shards=shards, recipe=RECIPE, crossval=SEEDS, run_config=RunConfig(name="mine"),
        slots=SlotConfig(cpus_per_worker=2),
    )  # fmt: skip
    outcome = verb.run()
    assert isinstance(given[0], CrossvalPlan)
    assert len(given[0].points) == 4
    assert given[0].recipe == RECIPE
    assert given[1:] == [verb.run_config, verb.slots]
    assert str(result) in outcome.text
    assert "predictions  s3://b/runs/cv/predictions.parquet?region=x" in outcome.text
    assert outcome.data["mean"]["wa"] == 0.75
    assert outcome.data["protocol"] == "speaker-2, 2 folds, a custom corpus"


def check_fold_against_plain_torch(shards: str, kept, folder: Path) -> None:
    """Train fold 1 of seed 1 in this process and test its selected epoch: the scores are equal."""
    recipe = replace(RECIPE, fold=1, seed=1)
    selected = folder / "alone"
    selected.mkdir()

    def keep_selected(epoch: EpochReport | None, make_snapshot: MakeSnapshot) -> None:
        assert epoch is not None
        if epoch.is_selected:
            make_snapshot().write(selected)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    fit(recipe, open_shards(shards), Pretrained("fresh weights", {}), keep_selected)
    alone = evaluate(selected, shards)
    torch.set_num_threads(threads)
    mine = kept.filter(np.logical_and(kept["seed"].to_numpy() == 1, kept["fold"].to_numpy() == 1))
    labels = alone.card.labels
    truth = label_indices(mine, labels)
    probabilities = np.stack([mine[f"p_{label}"].to_numpy() for label in labels], axis=1)
    assert mine["take"].to_pylist() == alone.predictions["take"].to_pylist()
    assert scores_of(truth, probabilities).loss == pytest.approx(alone.scores.loss, rel=1e-3)


def check_runs(result, shards: str, uri: str) -> None:
    client = MlflowClient(tracking_uri=uri)
    parent = client.get_run(result.run_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["test/ua"] == pytest.approx(result.pooled.mean("ua"))
    validation = [row["validation UA"] for row in result.trainings]
    assert parent.data.metrics["selected/ua"] == pytest.approx(np.mean(validation))
    assert result.pooled.card.temperature == 1, "every fold has its own"
    assert {file.path for file in client.list_artifacts(result.run_id, "tables")} == {
        "tables/crossval.json", "tables/speakers.csv", "tables/predictions.csv",
    }  # fmt: skip
    page = Path(client.download_artifacts(result.run_id, "report.html")).read_text()
    assert "test, speaker-2, 2 folds, speaker-independent" in page
    assert f"{result.pooled.mean('ua'):.1%}" in page
    assert parent.data.tags["protocol"] == "speaker-2, 2 folds, speaker-independent"
    nested = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{result.run_id}'"
    )
    assert sorted((run.data.params["fold"], run.data.params["seed"]) for run in nested) == [
        ("0", "0"), ("0", "1"), ("1", "0"), ("1", "1"),
    ]  # fmt: skip
    assert {run.info.status for run in nested} == {"FINISHED"}
    for run in nested:
        fold, seed = int(run.data.params["fold"]), int(run.data.params["seed"])
        place = fold_folder(result.location, replace(RECIPE, fold=fold, seed=seed))
        with local_checkpoint(place) as checkpoint:
            own = evaluate(checkpoint, shards)
        assert run.data.metrics["test/ua"] == pytest.approx(own.scores.ua)
        own_page = Path(client.download_artifacts(run.info.run_id, "report.html")).read_text()
        assert own_page.index("Test part</h2>") < own_page.index("Validation part</h2>")
        assert f"{own.scores.ua:.1%}" in own_page
    stored = Path(result.report).read_text()
    assert as_artifact(stored) == page
    assert len(set(re.findall('href="(trials/[^"]+)"', stored))) == len(nested)
    best = max(nested, key=lambda run: run.data.metrics["selected/ua"])
    assert best_training_of(result.run_id, uri) in {
        run.info.run_id
        for run in nested
        if run.data.metrics["selected/ua"] == best.data.metrics["selected/ua"]
    }


def check_conditions(
    result: CrossvalResult, shards: str, run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished cross-validation is scored under conditions, each fold by its own model."""
    clips = open_shards(shards).clips()
    truth = dict(zip(clips["path"].to_pylist(), clips["emotion"].to_pylist(), strict=True))
    models: list[str] = []

    def predict_under(asked, conditions, predictor):
        models.append(predictor.fingerprint)
        answers = {"level-plus-20": truth, "level-minus-20": {}}
        rows = [
            {"condition": name, "clip": clip, "emotion": answers[name].get(path), "status": "ok"}
            for name in conditions
            for clip, (path, _, _) in enumerate(asked)
        ]
        return [pa.Table.from_pylist(rows)]

    monkeypatch.setattr(robustness, "predict_under", predict_under)
    config = replace(SEEDS, under=("level",))
    plan = plan_crossval(shards, RECIPE, config)
    again = crossval(plan, run, SlotConfig(), show=lambda trials: None)
    assert len(set(models)) == 4  # two folds with two seeds
    by_name = {row["condition"]: row for row in again.pooled.under}
    assert (by_name["level-plus-20"]["ua"], by_name["level-plus-20"]["unscored"]) == (1, 0)
    assert by_name["level-minus-20"]["unscored"] == len(clips)
    assert "level-plus-20  UA 100.0%" in str(again)
    metrics = MlflowClient(tracking_uri=run.tracking_uri).get_run(result.run_id).data.metrics
    assert metrics["test/under/level-plus-20/ua"] == 1
    assert "Recording conditions</h3>" in Path(again.report).read_text()


def check_model_to_ship(result: CrossvalResult, shards: str, run: RunConfig) -> None:
    """The recipe of a cross-validation trains on all speakers, and the card has its scores."""
    recipe = recipe_like(result.run_id, run.tracking_uri)
    logs = [np.log(fold.card.temperature) for fold in result.folds]
    assert recipe == replace(RECIPE, temperature=recipe.temperature)
    assert recipe.temperature == pytest.approx(np.exp(np.mean(logs))) != 1
    shipped = train(shards, replace(recipe, protocol="all"), run, on_epoch=lambda row: None)
    assert shipped.card.temperature == recipe.temperature
    _, card = register(shipped.run_id, "shipped", "champion", run.tracking_uri)
    assert f"speaker-2, 2 folds, speaker-independent (run {result.run_id}): UA " in card
    assert f"UA {result.pooled.mean('ua'):.1%} (95 % interval " in card
    other = replace(recipe, protocol="all", weight_decay=0.5)
    unlike = train(shards, other, run, on_epoch=lambda row: None)
    _, card = register(unlike.run_id, "shipped", "champion", run.tracking_uri)
    assert "Cross-validated" not in card


@pytest.mark.parametrize(
    ("protocol", "folds", "kind"),
    [
        ("speaker-2", 2, "speaker-independent"),
        ("loso", 6, "speaker-independent"),
        ("random", 5, "SPEAKER-DEPENDENT"),
    ],
)
def test_the_label_says_who_is_tested(shards, protocol, folds, kind):
    recipe = replace(RECIPE, protocol=protocol)
    plan = plan_crossval(shards, recipe, SEEDS)
    assert plan.folds == tuple(range(folds))
    assert len(plan.points) == 2 * folds
    assert plan.label == f"{protocol}, {folds} folds, {kind}, a custom corpus"
    plan = plan_crossval(shards, recipe, CrossvalConfig(folds=(1, 0), part="validation"))
    assert plan.folds == (0, 1)
    assert (
        plan.label
        == f"{protocol}, folds 0, 1 of {folds}, VALIDATION parts, {kind}, a custom corpus"
    )
    with pytest.raises(ConfigError, match=rf"fold is {folds}: {protocol} has folds 0 to"):
        plan_crossval(shards, recipe, CrossvalConfig(folds=(folds,)))


@pytest.mark.ray
@pytest.mark.slow
def test_recipes_are_compared_on_validation_parts_and_no_test_part_is_read(
    two_cpus, shards, in_tmp
):
    run = RunConfig(storage=str(in_tmp / "runs"), tracking_uri=new_store(in_tmp))
    config = CrossvalConfig(folds=(1,), part="validation")
    plan = plan_crossval(shards, RECIPE, config)
    result = crossval(plan, run, SlotConfig(), show=lambda trials: None)
    parts = select_rows(open_shards(shards).clips(), replace(RECIPE, fold=1))
    scored = set(result.pooled.predictions["speaker"].to_pylist())
    assert scored == set(parts.validation_speakers)
    assert result.pooled.predictions.num_rows == len(parts.validation)
    assert "VALIDATION parts" in str(result)
    client = MlflowClient(tracking_uri=run.tracking_uri)
    parent = client.get_run(result.run_id)
    (nested,) = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{result.run_id}'"
    )
    assert parent.data.metrics["selected/ua"] == nested.data.metrics["selected/ua"]
    assert not [name for r in (parent, nested) for name in r.data.metrics if "test" in name]
    files = {file.path for file in client.list_artifacts(nested.info.run_id)}
    assert "report.html" in files
    page = Path(client.download_artifacts(nested.info.run_id, "report.html")).read_text()
    assert "Test part</h2>" not in page
    check_the_same_network_is_tested(result, shards, run)


def check_the_same_network_is_tested(validated, shards, run) -> None:
    """The test parts are scored with the networks whose validation parts were scored."""
    plan = plan_crossval(shards, RECIPE, CrossvalConfig(folds=(0, 1)))
    epochs: dict[int, set[int]] = {0: set(), 1: set()}

    def remember(trials: list[TrialRecord]) -> None:
        for trial in trials:
            epochs[trial.recipe.fold].add(trial.epochs)

    tested = crossval(plan, run, SlotConfig(), show=remember)
    assert tested.run_id != validated.run_id
    assert epochs == {0: {0, 1, 2}, 1: {0, 2}}  # all epochs of fold 1 are reported at once
    assert tested.trials[1].rows == validated.trials[0].rows
    assert tested.trials[1].learning_rates == validated.trials[0].learning_rates
    folder = fold_folder(validated.location, replace(RECIPE, fold=1))
    expected = evaluate(Path(folder), shards)
    assert tested.folds[1].is_own_test
    assert tested.folds[1].scores.confusion.tolist() == expected.scores.confusion.tolist()
    metrics = (
        MlflowClient(tracking_uri=run.tracking_uri).get_run(tested.trials[1].run_id).data.metrics
    )
    assert metrics["test/ua"] == expected.scores.ua
    assert metrics["val/ua"] == validated.trials[0].rows[-1]["val/ua"]


def test_a_recipe_that_names_a_fold_is_refused(shards):
    with pytest.raises(ConfigError, match=r"crossval trains every fold, or the folds of --folds"):
        plan_crossval(shards, replace(RECIPE, fold=1), SEEDS)


def test_the_name_follows_from_recipe_part_and_shards_but_not_from_seeds_and_folds(shards):
    def name(recipe: TrainConfig = RECIPE, config: CrossvalConfig = SEEDS) -> str:
        return crossval_name(plan_crossval(shards, recipe, config))

    more_folds = replace(SEEDS, folds=(0,))
    assert name() == name(config=CrossvalConfig(seeds=3)) == name(config=more_folds)
    assert name() not in [
        name(config=replace(SEEDS, part="validation")),
        name(replace(RECIPE, epochs=3)),
    ]
