"""Streamed training clips: their order, and training on them, with and without Ray Data."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from ser_ray.distributed import ingest
from ser_ray.distributed.run_config import RunConfig
from ser_ray.errors import CheckpointError
from ser_ray.training import loop
from ser_ray.training import streaming as stream
from ser_ray.training.checkpoint import MODEL
from ser_ray.training.data import epoch_order, load_fold, steps_per_epoch
from ser_ray.training.optim import one_cycle
from ser_ray.training.streaming import Lanes, StepRange, resident_bytes, stream_fold, stream_order
from ser_ray.training.world import World
from tests.conftest import PLAIN
from tests.mlflow_store import new_store
from tests.shard_files import write_shard_files
from tests.training.test_trainer import CONFIG, trained

CPU = torch.device("cpu")


@given(
    st.integers(0, 5),
    st.integers(0, 5),
    st.lists(st.integers(1, 9), min_size=1, max_size=12),
    st.integers(1, 8),
)
def test_an_epoch_uses_each_clip_once_and_a_lane_does_not_return_to_a_shard(
    seed, epoch, sizes, batch
):
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    batch = min(batch, len(shard_of))
    order = stream_order(seed, epoch, shard_of, batch)
    assert order.shape == (steps_per_epoch(len(shard_of), batch), batch)
    assert len(np.unique(order)) == order.size
    np.testing.assert_array_equal(order, stream_order(seed, epoch, shard_of, batch))
    changes = sum(a != b for lane in shard_of[order].T for a, b in pairwise(lane))
    assert changes < len(sizes)  # no lane returns to a shard


def test_epochs_and_seeds_have_different_orders():
    shard_of = np.repeat(np.arange(10), 20)
    orders = [
        stream_order(seed, epoch, shard_of, 8).tolist() for seed in (0, 1) for epoch in (0, 1)
    ]
    assert all(one != other for one, other in pairwise([*orders, orders[0]]))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_shares_of_all_workers_add_up_to_every_batch(size):
    shard_of = np.repeat(np.arange(10), 7)
    config = replace(CONFIG, batch_size=8)
    lanes = [Lanes(config, World(rank, size), shard_of) for rank in range(size)]
    ranges = lanes[0].step_ranges(epoch=1, step=3, length=2)
    assert ranges[:3] == [StepRange(1, 3, 5), StepRange(1, 5, 7), StepRange(1, 7, 8)]
    assert ranges[3:7] == [StepRange(2, first, first + 2) for first in range(0, 8, 2)]
    assert len(ranges) == 7, "to the end of the training"
    for steps in ranges:
        shares = [lane.clips(steps).reshape(-1, lane.clips_per_step) for lane in lanes]
        together = np.sort(np.concatenate(shares, axis=1))
        whole = stream_order(config.seed, steps.epoch, shard_of, 8)[steps.first : steps.last]
        np.testing.assert_array_equal(together, np.sort(whole))


class Spy:
    """A `Fetch` that records the requested items and returns arrays in pieces."""

    def __init__(self) -> None:
        self.items: list[Any] = []

    def __call__(
        self, read: Callable[[Any], np.ndarray], items: Sequence[Any]
    ) -> Iterator[np.ndarray]:
        for item in items:
            self.items.append(item)
            values = read(item)
            yield from (values[:5], values[5:]) if len(values) > 5 else (values,)


@pytest.fixture
def small(small_network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small network, and ranges of three steps: 18 clips of 16 bins and 24 frames."""
    monkeypatch.setattr(stream, "READ_BYTES", 18 * 16 * 24 * 2)


def test_streamed_clips_and_labels_equal_the_resident_ones(memory_shards, small):
    spy = Spy()
    streamed = stream_fold(memory_shards, CONFIG, CPU, World(), spy, None)
    resident = load_fold(memory_shards, CONFIG, CPU)
    np.testing.assert_allclose(streamed.normalisation.mean, resident.normalisation.mean, rtol=1e-12)
    np.testing.assert_allclose(streamed.normalisation.std, resident.normalisation.std, rtol=1e-9)
    assert len(streamed.train) == len(resident.train)
    shard_of = streamed.train.shard_of
    batches = streamed.train.batches(CONFIG, World(), epoch=1, step=1)
    for (epoch, step), batch in zip([(1, 1), (1, 2), (1, 3), (2, 0)], batches, strict=False):
        clips = torch.from_numpy(stream_order(CONFIG.seed, epoch, shard_of, 6)[step])
        for name in ("features", "num_frames", "labels"):
            torch.testing.assert_close(
                getattr(batch.clips, name), getattr(resident.train, name)[clips]
            )
    ranges = [item for item in spy.items if isinstance(item, StepRange)]
    assert ranges == [StepRange(1, 1, 4), StepRange(2, 0, 3)], "nothing is read before it is needed"


def test_a_streamed_training_has_the_same_learning_rates_and_learns(memory_shards, small, tmp_path):
    config = replace(CONFIG, epochs=8, batch_size=8, augment=PLAIN, label_smoothing=0)
    streamed = trained(memory_shards, tmp_path / "streamed", config, stream=map).reports
    resident = trained(memory_shards, tmp_path / "resident", config).reports
    assert [report.learning_rates for report in streamed] == [
        report.learning_rates for report in resident
    ]
    assert streamed[-1].row["train/loss"] < 0.8 * streamed[0].row["train/loss"]
    assert max(report.row["val/ua"] for report in streamed) > 0.6  # chance is 0.25


def test_a_stream_resumed_in_mid_epoch_equals_an_uninterrupted_one_bit_for_bit(
    memory_shards, small, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "PREEMPTION_CHECK_STEPS", 3)
    asked = iter([False, True])
    how = {"stream": map, "preemption_check": lambda: next(asked, False)}
    trained(memory_shards, tmp_path / "1", CONFIG, **how)
    trained(memory_shards, tmp_path / "2", CONFIG, resume=tmp_path / "1" / "notice", stream=map)
    expected, actual = (
        load_file(tmp_path / name / MODEL) for name in (Path("1", "3"), Path("2", "2"))
    )
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_weighted_draws_are_the_same_clips_streamed_and_resident(memory_shards, small):
    """The order differs, but not how often each clip is in the epoch."""
    config = replace(CONFIG, balanced=True, batch_size=1)
    streamed = stream_fold(memory_shards, config, CPU, World(), map, None)
    resident = load_fold(memory_shards, config, CPU)
    lanes = Lanes(config, World(), streamed.train.shard_of, streamed.train.weights)
    (steps,) = lanes.step_ranges(config.epochs - 1, 0, len(streamed.train))
    assert resident.train.weights is not None
    epoch, rows = config.epochs - 1, len(resident.train)
    drawn = epoch_order(config.seed, epoch, rows, resident.train.weights)
    assert sorted(lanes.clips(steps)) == sorted(drawn.tolist())
    assert len(set(drawn.tolist())) < len(drawn), "some clips are repeated"


def test_resident_checkpoints_cannot_be_streamed(memory_shards, small, tmp_path):
    trained(memory_shards, tmp_path / "resident")
    with pytest.raises(CheckpointError, match="ingest differs: 'resident' instead of 'stream'"):
        trained(memory_shards, tmp_path, resume=tmp_path / "resident" / "1", stream=map)


def test_auto_streams_if_the_clips_need_more_than_half_of_a_workers_memory(memory_shards):
    needed, card = resident_bytes(memory_shards, CONFIG), memory_shards.card
    data = load_fold(memory_shards, CONFIG, CPU)
    bins, num_frames = card.shape_of("mel")
    num_clips = len(data.train) + len(data.validation)
    assert needed == num_clips * bins * num_frames * 2
    assert needed > data.train.features.nbytes + data.validation.features.nbytes

    def is_streamed(wanted: Any, memory: int) -> bool:
        return ingest.should_stream(wanted, CONFIG, memory_shards, lambda: memory, CPU, None)

    assert not is_streamed("auto", 2 * needed)
    assert is_streamed("auto", 2 * needed - 1)
    assert is_streamed("stream", 2 * needed)
    assert not is_streamed("resident", 1)


def test_threads_read_windows_in_order_and_a_closed_stream_reads_no_more():
    asked: list[int] = []

    def read(item: int) -> np.ndarray:
        asked.append(item)
        return np.full(2, item)

    pieces = list(ingest.fetch_by_threads(read, [3, 1, 2]))
    assert np.concatenate(pieces).tolist() == [3, 3, 1, 1, 2, 2]
    asked.clear()
    arrays = ingest.fetch_by_threads(read, range(100))
    assert next(arrays).tolist() == [0, 0]
    arrays.close()
    assert max(asked) <= ingest.READERS


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")  # of its own settings
def test_two_workers_stream_through_ray_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from mlflow import MlflowClient

    from ser_ray.distributed.train import train

    config = replace(CONFIG, lr_max=1e-3, augment=PLAIN)
    run = RunConfig(
        workers="2",
        device="cpu",
        ingest="stream",
        storage=str(tmp_path / "runs"),
        tracking_uri=new_store(tmp_path),
    )
    ray.init(
        num_cpus=2, include_dashboard=False, address="local", log_to_driver=False,
        logging_level="ERROR",
    )  # fmt: skip
    try:
        context = ray.data.DataContext.get_current()
        monkeypatch.setattr(context, "enable_progress_bars", True)
        monkeypatch.setattr(context.execution_options, "preserve_order", False)
        pieces = list(
            ingest.fetch_by_ray(lambda item: np.full((2, 3), item, np.float16), [3, 1, 2])
        )
        np.testing.assert_array_equal(np.concatenate(pieces)[::2, 0], [3, 1, 2])
        after = ray.data.DataContext.get_current()
        assert (after.enable_progress_bars, after.execution_options.preserve_order) == (True, False)
        result = train(write_shard_files(tmp_path / "shards"), config, run, on_epoch=lambda _: None)
    finally:
        ray.shutdown()
    assert result.card.ingest == "stream"
    assert [row["speed/workers"] for row in result.history] == [2, 2, 2]
    assert result.history[-1]["train/loss"] < result.history[0]["train/loss"]
    client = MlflowClient(run.tracking_uri)
    rates = client.get_metric_history(result.run_id, "train/lr")
    optimiser = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    schedule = one_cycle(optimiser, config, 4 * config.epochs)
    for step, metric in enumerate(sorted(rates, key=lambda metric: metric.step)):
        assert (metric.step, metric.value) == (step, schedule.get_last_lr()[0])
        optimiser.step()
        if step < 4 * config.epochs - 1:
            schedule.step()
    assert len(rates) == 4 * config.epochs
    metrics = client.get_run(result.run_id).data.metrics
    cpu = [value for name, value in metrics.items() if name.endswith("cpu_utilization_percentage")]
    assert len(cpu) == 1
    assert 0 < cpu[0] <= 100
