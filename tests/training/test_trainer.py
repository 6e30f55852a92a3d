"""The loop in one process and in several plain ones, without Ray."""

import hashlib
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from sklearn.metrics import balanced_accuracy_score
from torch import nn
from torch.optim import AdamW

from ser_ray.errors import CheckpointError, ConfigError, DivergedError
from ser_ray.training import loop, model, trainer
from ser_ray.training.calibration import fit_temperature
from ser_ray.training.checkpoint import MODEL, STATE, read_card
from ser_ray.training.data import Batch, load_fold
from ser_ray.training.loop import MakeSnapshot, fit
from ser_ray.training.model import Pretrained, ResNet18, to_channels_last
from ser_ray.training.optim import one_cycle
from ser_ray.training.recipe import AugmentConfig, TrainConfig
from ser_ray.training.scoring import predict_clips
from ser_ray.training.trainer import EpochReport
from tests.conftest import PLAIN, cut_into_windows, make_memory_shards
from tests.models import SmallNetwork

pytestmark = pytest.mark.usefixtures("small_network")

CPU = torch.device("cpu")
FRESH = Pretrained("fresh weights", {})
CONFIG = TrainConfig(
    augment=AugmentConfig(noise=0, echo=0, band_limit=0),
    protocol="speaker-3",
    epochs=3,
    batch_size=6,
    crop_frames=16,
    weights="none",
    lr_max=5e-3,
)


class Recorder:
    """Records every epoch's report and writes its checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reports: list[EpochReport] = []
        self.names: list[str] = []

    def __call__(self, epoch: EpochReport | None, make_snapshot: MakeSnapshot) -> None:
        snapshot = make_snapshot()
        if epoch is not None:
            self.reports.append(epoch)
        self.names.append(snapshot.name)
        directory = self.folder / (str(len(self.reports)) if epoch else "notice")
        directory.mkdir(parents=True)
        snapshot.write(directory)


def trained(shards, folder: Path, config: TrainConfig = CONFIG, **how) -> Recorder:
    recorder = Recorder(folder)
    fit(config, shards, FRESH, recorder, **how)
    return recorder


def test_onecycle_rises_from_lr_min_to_lr_max_and_falls_to_its_end(memory_shards, tmp_path):
    rates = [
        rate
        for report in trained(memory_shards, tmp_path).reports
        for rate in report.learning_rates
    ]
    assert rates[0] == pytest.approx(CONFIG.lr_min)
    assert max(rates) == pytest.approx(CONFIG.lr_max, rel=0.05)
    assert rates[-1] == pytest.approx(CONFIG.lr_min / CONFIG.final_div_factor)
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


@pytest.mark.parametrize(
    ("steps", "peak_at"), [(1, 0.3), (2, 0.5), (3, 0.3), (10, 0.1), (40, 0.01)]
)
def test_onecycle_starts_at_lr_min_however_short_it_is(steps, peak_at):
    config = replace(CONFIG, pct_start=peak_at)
    optimiser = AdamW([nn.Parameter(torch.zeros(1))], lr=config.lr_min)
    schedule = one_cycle(optimiser, config, steps)
    rates = [float(schedule.get_last_lr()[0])]
    for _ in range(steps - 1):
        optimiser.step()
        schedule.step()
        rates.append(float(schedule.get_last_lr()[0]))
    assert rates[0] == pytest.approx(config.lr_min)
    assert max(rates[1:], default=config.lr_max) == pytest.approx(config.lr_max, rel=0.01)


def new_trainer(shards, config: TrainConfig, device: torch.device = CPU) -> trainer.Trainer:
    data = load_fold(shards, config, device)
    return trainer.Trainer(config, shards.card, data, FRESH, device, trainer.World())


def test_momentum_falls_while_the_learning_rate_rises(memory_shards):
    run = new_trainer(memory_shards, replace(CONFIG, pct_start=0.5))
    betas = [run.optimiser.param_groups[0]["betas"][0]]
    run.begin_epoch()
    while not run.epoch_finished:
        run.train_step()
        betas.append(run.optimiser.param_groups[0]["betas"][0])
    learning_rates = run.progress.learning_rates
    assert learning_rates == sorted(learning_rates)
    assert betas == sorted(betas, reverse=True)
    assert betas[0] - betas[-1] > 0.03


def test_the_selected_epoch_is_the_last_or_the_best_on_validation(memory_shards, tmp_path):
    restless = replace(CONFIG, epochs=6, lr_max=0.5, pct_start=0.9)
    last, best = (
        trained(memory_shards, tmp_path / keep, replace(restless, keep=keep)).reports
        for keep in ("last", "best")
    )
    rows = [report.row for report in best]
    assert len({row["val/ua"] for row in rows}) > 1
    selected = [report.row for report in best if report.is_selected][-1]
    assert selected == max(rows, key=lambda row: (row["val/ua"], -row["val/loss"]))
    assert selected != rows[-1]
    assert all(report.is_selected for report in last)
    assert [report.row["val/ua"] for report in last] == [row["val/ua"] for row in rows]


@pytest.mark.parametrize(("smoothing", "expected"), [(0.0, 0.0), (0.5, 0.5 * 0.75 * 20)])
def test_the_loss_includes_label_smoothing(memory_shards, smoothing, expected):
    config = replace(CONFIG, label_smoothing=smoothing)
    run = new_trainer(memory_shards, config)
    run.data.train.labels.zero_()  # type: ignore[attr-defined]
    with torch.no_grad():  # the network predicts label 0, which is correct, with certainty
        run.network.fc.weight.zero_()
        run.network.fc.bias.copy_(torch.tensor([20.0, 0, 0, 0]))
    run.begin_epoch()
    run.train_step()
    assert float(run.losses[0]) == pytest.approx(expected, abs=1e-3)


def test_training_lowers_the_loss_and_beats_chance(memory_shards, tmp_path):
    config = replace(CONFIG, epochs=12, batch_size=8, augment=PLAIN, label_smoothing=0)
    reports = trained(memory_shards, tmp_path, config).reports
    assert reports[-1].row["train/loss"] < 0.7 * reports[0].row["train/loss"]
    assert max(report.row["val/ua"] for report in reports) > 0.6  # chance is 0.25


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_step_waits_for_the_gpu(memory_shards):
    run = new_trainer(memory_shards, CONFIG, torch.device("cuda"))
    run.begin_epoch()
    run.train_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_resumed_training_equals_an_uninterrupted_one_bit_for_bit(memory_shards, tmp_path):
    whole = trained(memory_shards, tmp_path / "whole")
    rest = trained(memory_shards, tmp_path / "rest", resume=tmp_path / "whole" / "1")
    assert [r.learning_rates for r in rest.reports] == [r.learning_rates for r in whole.reports[1:]]
    expected = load_file(tmp_path / "whole" / "3" / MODEL)
    actual = load_file(tmp_path / "rest" / "2" / MODEL)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize("step", [3, 4], ids=["in mid-epoch", "after an epoch's last step"])
def test_resuming_after_a_preemption_notice_equals_an_uninterrupted_training(
    memory_shards, tmp_path, monkeypatch, step
):
    monkeypatch.setattr(loop, "PREEMPTION_CHECK_STEPS", step)
    config = replace(CONFIG, batch_size=6)
    assert len(load_fold(memory_shards, config, CPU).train) // config.batch_size == 4
    asked = iter([False, True])
    whole = trained(
        memory_shards, tmp_path / "1", config, preemption_check=lambda: next(asked, False)
    )
    assert whole.names[1] == f"checkpoint-000001-{2 * step - 4:06d}"
    rest = trained(memory_shards, tmp_path / "2", config, resume=tmp_path / "1" / "notice")
    for resumed, uninterrupted in zip(rest.reports, whole.reports[1:], strict=True):
        assert resumed.learning_rates == uninterrupted.learning_rates
        assert resumed.row["train/loss"] == uninterrupted.row["train/loss"]
        assert resumed.row["train/wa"] == uninterrupted.row["train/wa"]
    expected = load_file(tmp_path / "1" / "3" / MODEL)
    actual = load_file(tmp_path / "2" / "2" / MODEL)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_a_snapshot_soon_after_a_resume_has_the_temperature_of_the_last_validation(
    memory_shards, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "PREEMPTION_CHECK_STEPS", 1)
    trained(memory_shards, tmp_path / "1")
    is_asked = partial(next, iter([True]), False)
    trained(memory_shards, tmp_path / "2", resume=tmp_path / "1" / "1", preemption_check=is_asked)
    temperature = read_card(tmp_path / "1" / "1").temperature
    assert temperature != 1
    assert read_card(tmp_path / "2" / "notice").temperature == temperature


def test_a_snapshot_does_not_change_while_training_continues(memory_shards, tmp_path):
    snapshots = []
    fit(CONFIG, memory_shards, FRESH, lambda _, make_snapshot: snapshots.append(make_snapshot()))
    again = trained(memory_shards, tmp_path)
    for index, snapshot in enumerate(snapshots):
        expected = load_file(again.folder / str(index + 1) / MODEL)
        assert all(torch.equal(snapshot.weights[key], expected[key]) for key in expected)
        assert snapshot.progress["epoch"] == index + 1
        assert len(snapshot.progress["history"]) == index + 1


def test_validation_ua_equals_scikit_learns_on_the_same_predictions(memory_shards, tmp_path):
    report = trained(memory_shards, tmp_path).reports[-1]
    data = load_fold(memory_shards, CONFIG, CPU)
    network = SmallNetwork(len(data.labels))
    network.load_state_dict(load_file(tmp_path / "3" / MODEL))
    rows = np.arange(len(data.validation))
    found = predict_clips(network, data.validation, rows, CONFIG, len(data.labels))
    truth = data.validation.labels.numpy()
    assert report.row["val/ua"] == pytest.approx(
        balanced_accuracy_score(truth, found.argmax(axis=1))
    )
    assert np.sum(report.progress.selected_confusion) == len(truth)
    temperature = read_card(tmp_path / "3").temperature
    assert temperature == pytest.approx(fit_temperature(truth, found), rel=1e-6)
    assert temperature != 1


def test_the_temperature_is_fitted_to_clips_that_were_cut_into_windows(memory_shards, tmp_path):
    times = np.where(np.arange(len(memory_shards.table)) % 3 == 0, 3, 1)
    cut: Any = cut_into_windows(memory_shards, times)
    trained(cut, tmp_path)
    uncut, data = load_fold(memory_shards, CONFIG, CPU), load_fold(cut, CONFIG, CPU)
    network = SmallNetwork(len(data.labels))
    network.load_state_dict(load_file(tmp_path / "3" / MODEL))
    rows = np.arange(len(uncut.validation))
    found = predict_clips(network, data.validation, rows, CONFIG, len(data.labels))
    expected = fit_temperature(uncut.validation.labels.numpy(), found)
    assert read_card(tmp_path / "3").temperature == pytest.approx(expected, rel=1e-6)


def test_the_error_of_a_loss_that_is_not_finite_names_the_step(memory_shards, tmp_path):
    rows = load_fold(memory_shards, CONFIG, CPU).split.train
    memory_shards.values[rows[0]] = np.nan
    with pytest.raises(DivergedError, match="loss of step 0 of epoch 1 is not finite"):
        trained(memory_shards, tmp_path)


def test_a_weight_that_is_not_finite_is_named_even_if_the_loss_is_finite(
    memory_shards, tmp_path, monkeypatch
):
    class Unused(NoBatchNorm):
        def __init__(self, num_labels: int) -> None:
            super().__init__(num_labels)
            self.unused = nn.Parameter(torch.tensor([1.0, torch.nan]))

    monkeypatch.setattr(model, "ResNet18", Unused)
    with pytest.raises(DivergedError, match="unused is not finite after epoch 1, though the loss"):
        trained(memory_shards, tmp_path)


@pytest.mark.parametrize(
    ("able", "bins", "frames", "bfloat16"),
    [
        ({"avx512_bf16": True}, 40, 128, True),
        ({"amx_bf16": True}, 64, 64, True),
        ({"avx512_f": True, "avx512_bf16": False}, 64, 128, False),
        ({"avx512_bf16": True}, 32, 128, False),
        ({"avx512_bf16": True}, 64, 32, False),
    ],
)
def test_a_cpu_trains_in_bfloat16_if_it_supports_it_and_inputs_are_large(
    able, bins, frames, bfloat16, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert trainer.supports_bfloat16(CPU, bins, frames) is bfloat16


@pytest.mark.parametrize(("bins", "frames"), [(33, 33), (40, 128)])
def test_bfloat16_gradients_are_finite_and_reproducible(bins, frames):
    if not trainer.supports_bfloat16(CPU, bins, frames):
        pytest.skip("needs a CPU that multiplies bfloat16")
    gradients = []
    for _ in range(2):
        torch.manual_seed(0)
        network = to_channels_last(ResNet18(4), CPU)
        for _ in range(4):  # later passes reuse the memory of the first
            with torch.autocast("cpu", torch.bfloat16):
                network(torch.randn(8, 1, bins, frames)).square().mean().backward()
        gradients.append([value.grad for value in network.parameters() if value.grad is not None])
    assert len(gradients[0]) == len(list(network.parameters()))
    for gradient, again in zip(*gradients, strict=True):
        assert gradient.isfinite().all()
        assert torch.equal(gradient, again)


def test_bfloat16_is_chosen_by_the_size_of_the_trained_feature(monkeypatch):
    asked: list[tuple[int, int]] = []

    def ask(device: torch.device, num_bins: int, num_frames: int) -> bool:
        asked.append((num_bins, num_frames))
        return False

    monkeypatch.setattr(trainer, "supports_bfloat16", ask)
    monkeypatch.setattr(model, "ResNet18", NoBatchNorm)
    shards = make_memory_shards()
    config = replace(CONFIG, feature="mfcc")
    data = new_trainer(shards, config).data
    assert asked == [(data.validation.features.shape[2], CONFIG.crop_frames)]
    assert asked[0][0] != 40


def test_a_checkpoint_of_another_training_is_refused(memory_shards, tmp_path):
    trained(memory_shards, tmp_path / "one")
    other = replace(CONFIG, lr_max=0.01)
    with pytest.raises(CheckpointError, match=r"lr_max is 0.005 instead of 0.01"):
        trained(memory_shards, tmp_path / "two", other, resume=tmp_path / "one" / "1")


def test_a_checkpoint_cut_short_is_refused(memory_shards, tmp_path):
    trained(memory_shards, tmp_path / "one")
    state = tmp_path / "one" / "1" / STATE
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="state cannot be loaded"):
        trained(memory_shards, tmp_path / "two", resume=tmp_path / "one" / "1")


def test_more_workers_than_clips_in_a_batch_are_refused(memory_shards, monkeypatch):
    monkeypatch.setattr(trainer.World, "current", lambda: trainer.World(rank=0, size=7))
    with pytest.raises(ConfigError, match="batch_size is 6, but there are 7 workers"):
        fit(CONFIG, memory_shards, FRESH, lambda *_: None)


class NoBatchNorm(nn.Module):
    """A network whose result does not depend on how a batch is split over workers."""

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 5, stride=2)
        self.fc = nn.Linear(8, num_labels)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.conv(batch)).mean(dim=(2, 3)))


def _run_worker(rank: int, size: int, network: str, folder: str, config: TrainConfig) -> None:
    torch.set_num_threads(1)
    batches: list[list[int]] = []
    trainer.supports_bfloat16 = lambda *_: False  # its rounding would hide differences
    if network == "no batch norm":
        model.ResNet18 = NoBatchNorm  # type: ignore[misc,assignment]
    if size > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size
        )
    step = trainer.Trainer.update_weights

    def spy(self: trainer.Trainer, batch: Batch) -> object:
        batches.append(batch.rows.tolist())
        return step(self, batch)

    trainer.Trainer.update_weights = spy  # type: ignore[assignment,method-assign]
    reports: list[EpochReport] = []
    validated: list[str] = []
    """Hash of each epoch's weights: all ranks must have validated the same network."""

    def keep(epoch: EpochReport | None, make_snapshot: MakeSnapshot) -> None:
        assert epoch is not None
        reports.append(epoch)
        validated.append(hashlib.sha256(save(make_snapshot().weights)).hexdigest())

    fit(config, make_memory_shards(), FRESH, keep)  # type: ignore[arg-type]
    result = {
        "batches": batches,
        "lr": [rate for report in reports for rate in report.learning_rates],
        "loss": [report.row["train/loss"] for report in reports],
        "val/loss": [report.row["val/loss"] for report in reports],
        "confusion": reports[-1].progress.selected_confusion,
        "validated": validated,
    }
    torch.save(result, f"{folder}/{rank}.pt")
    if size > 1:
        torch.distributed.destroy_process_group()
        # An ordinary exit was once aborted by one of torch's threads ("terminate called without an
        # active exception"). The result is written by now, and an error would have been raised.
        os._exit(0)


def run_world(size: int, network: str, folder: Path, config: TrainConfig = CONFIG) -> dict:
    folder.mkdir()
    torch.multiprocessing.spawn(_run_worker, (size, network, str(folder), config), nprocs=size)
    results = [torch.load(folder / f"{rank}.pt") for rank in range(size)]
    for other in results[1:]:
        assert other == results[0], "ranks disagree"
    return results[0]


def test_bfloat16_trains_as_float32_does_and_validates_in_float32(
    memory_shards, tmp_path, monkeypatch
):
    monkeypatch.setattr(model, "ResNet18", NoBatchNorm)
    losses = []
    for able in (False, True):
        monkeypatch.setattr(trainer, "supports_bfloat16", lambda *_, able=able: able)
        recorder = trained(memory_shards, tmp_path / str(able))
        losses.append([report.row["train/loss"] for report in recorder.reports])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)

    network = NoBatchNorm(4)
    network.load_state_dict(load_file(recorder.folder / "3" / MODEL))
    clips = load_fold(memory_shards, CONFIG, CPU).validation
    probabilities = predict_clips(network, clips, np.arange(len(clips)), CONFIG, 4)
    truth = probabilities[np.arange(len(clips)), clips.labels.numpy()]
    val_loss = recorder.reports[-1].row["val/loss"]
    assert val_loss == pytest.approx(-np.log(truth).mean(), rel=1e-6)


@pytest.mark.slow
def test_one_two_and_three_workers_train_the_same(tmp_path):
    one, two, three = (run_world(n, "no batch norm", tmp_path / str(n), CONFIG) for n in (1, 2, 3))
    for many in (two, three):
        assert many["batches"] == one["batches"]
        assert many["lr"] == one["lr"]
        assert many["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert many["val/loss"] == pytest.approx(one["val/loss"], rel=1e-5)
        assert many["confusion"] == one["confusion"]


@pytest.mark.slow
def test_resnet18_sees_the_same_batches_and_all_workers_validate_the_same_network(tmp_path):
    # Its batch norm sees half of each batch, so losses differ; the ranks must agree on them.
    one, two = (run_world(n, "resnet18", tmp_path / str(n), CONFIG) for n in (1, 2))
    assert two["batches"] == one["batches"]
    assert two["lr"] == one["lr"]
    assert two["loss"][0] == pytest.approx(one["loss"][0], rel=0.2)
