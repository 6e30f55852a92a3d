from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from mlflow import MlflowClient

from ser_ray.errors import ConfigError
from ser_ray.inference.crossval import _truth, count_folds, crossval, crossval_name, fold_folder
from ser_ray.inference.evaluate import evaluate
from ser_ray.registry import best_training_of, local_checkpoint
from ser_ray.shards.read import open_shards
from ser_ray.training.config import AugmentConfig, RunConfig, TrainConfig
from ser_ray.training.loop import EpochReport, Take, fit
from ser_ray.training.metrics import scores_of
from ser_ray.training.model import Pretrained
from ser_ray.training.search_config import CrossvalConfig, SlotConfig
from tests.conftest import make_memory_shards
from tests.shard_files import write_shard_files

RECIPE = TrainConfig(
    protocol="speaker-2", weights="none", crop_frames=24, batch_size=8, epochs=2, lr_max=4e-3,
    augment=AugmentConfig(time_mask_frames=4),
)  # fmt: skip
SEEDS = CrossvalConfig(seeds=2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    memory = make_memory_shards(num_frames=26)  # as many as half a second has
    return write_shard_files(tmp_path_factory.mktemp("shards") / "shards", memory, ("mel", "mfcc"))


@pytest.mark.ray
@pytest.mark.slow
def test_every_clip_is_tested_once_a_seed_with_the_fold_it_was_held_out_of(shards, tmp_path):
    ray.init(
        num_cpus=2, include_dashboard=False, address="local", log_to_driver=False,
        logging_level="ERROR",
    )  # fmt: skip
    try:
        run = RunConfig(
            storage=str(tmp_path / "runs"), tracking_uri=f"sqlite:///{tmp_path}/mlflow.db"
        )
        result = crossval(shards, RECIPE, run, SEEDS, SlotConfig(), show=lambda trials: None)
        again = crossval(shards, RECIPE, run, SEEDS, SlotConfig(), show=lambda trials: None)
    finally:
        ray.shutdown()
    assert again.to_dict() == result.to_dict()  # a finished one is read, not trained again
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
    assert result.mean("wa") == pytest.approx(np.mean(by_hand))
    assert result.spread("wa") == pytest.approx(np.std(by_hand, ddof=1))
    assert result.confusion.sum() == len(kept)
    assert result.intervals.wa[0] <= result.mean("wa") <= result.intervals.wa[1]
    check_fold_against_plain_torch(shards, kept, tmp_path)
    check_runs(result, shards, run.tracking_uri)


def check_fold_against_plain_torch(shards: str, kept, folder: Path) -> None:
    """Fold 1 of seed 1 trained here, its best epoch kept, and tested: the same scores."""
    recipe = replace(RECIPE, fold=1, seed=1)
    chosen = folder / "alone"
    chosen.mkdir()

    def keep_best(epoch: EpochReport | None, take: Take) -> None:
        assert epoch is not None
        if epoch.is_best:
            take().write(chosen)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    fit(recipe, open_shards(shards), Pretrained("fresh weights", {}), keep_best)
    alone = evaluate(chosen, shards)
    torch.set_num_threads(threads)
    mine = kept.filter(np.logical_and(kept["seed"].to_numpy() == 1, kept["fold"].to_numpy() == 1))
    labels = alone.card.labels
    truth, _ = _truth(mine, labels)
    probabilities = np.stack([mine[f"p_{label}"].to_numpy() for label in labels], axis=1)
    assert mine["take"].to_pylist() == alone.predictions["take"].to_pylist()
    assert scores_of(truth, probabilities).loss == pytest.approx(alone.scores.loss, rel=1e-3)


def check_runs(result, shards: str, uri: str) -> None:
    client = MlflowClient(tracking_uri=uri)
    parent = client.get_run(result.run_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["test_ua"] == pytest.approx(result.mean("ua"))
    assert {file.path for file in client.list_artifacts(result.run_id, "tables")} == {
        "tables/crossval.json", "tables/speakers.csv", "tables/predictions.csv",
    }  # fmt: skip
    page = Path(client.download_artifacts(result.run_id, "report.html")).read_text()
    assert "test, speaker-2, 2 folds, speaker-independent" in page
    assert f"{result.mean('ua'):.1%}" in page
    nested = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{result.run_id}'"
    )
    assert sorted((run.data.params["fold"], run.data.params["seed"]) for run in nested) == [
        ("0", "0"), ("0", "1"), ("1", "0"), ("1", "1"),
    ]  # fmt: skip
    assert {run.info.status for run in nested} == {"FINISHED"}
    for run in nested:
        fold, seed = int(run.data.params["fold"]), int(run.data.params["seed"])
        with local_checkpoint(fold_folder(result.location, fold, seed)) as checkpoint:
            own = evaluate(checkpoint, shards)
        assert run.data.metrics["test_ua"] == pytest.approx(own.scores.ua)
        assert {"report.html", "report_test.html"} <= {
            file.path for file in client.list_artifacts(run.info.run_id)
        }
    best = max(nested, key=lambda run: run.data.metrics["best_val_ua"])
    assert best_training_of(result.run_id, uri) in {
        run.info.run_id
        for run in nested
        if run.data.metrics["best_val_ua"] == best.data.metrics["best_val_ua"]
    }


@pytest.mark.parametrize(
    ("protocol", "folds", "kind"),
    [
        ("speaker-2", 2, "speaker-independent"),
        ("loso", 6, "speaker-independent"),
        ("random", 5, "SPEAKER-DEPENDENT"),
    ],
)
def test_the_label_says_who_is_tested(shards, protocol, folds, kind):
    counted, label = count_folds(open_shards(shards), replace(RECIPE, protocol=protocol))
    assert counted == folds
    assert label == f"{protocol}, {folds} folds, {kind}, table"


def test_a_fold_makes_no_sense(shards):
    recipe = replace(RECIPE, fold=1)
    with pytest.raises(ConfigError, match="crossval trains every fold"):
        crossval(shards, recipe, RunConfig(), SEEDS, SlotConfig(), show=lambda trials: None)


def test_the_name_follows_from_recipe_seeds_and_shards(shards):
    opened = open_shards(shards)
    name = crossval_name(RECIPE, SEEDS, opened)
    assert name == crossval_name(RECIPE, SEEDS, opened)
    others = [
        crossval_name(RECIPE, CrossvalConfig(seeds=3), opened),
        crossval_name(replace(RECIPE, epochs=3), SEEDS, opened),
    ]
    assert name not in others
