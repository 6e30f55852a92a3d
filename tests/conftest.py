"""Fixtures that several tests share."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import settings

from ser_ray.corpus.ravdess.names import EMOTIONS
from ser_ray.features.config import FeatureConfig
from ser_ray.features.encoder_card import EncoderCard
from ser_ray.shards.card import ShardCard, UsedCorpus
from ser_ray.shards.read import ShardSet
from ser_ray.training.recipe import AugmentConfig

if TYPE_CHECKING:
    from ser_ray.inference.predictor import Predictor
    from tests.mlflow_server import MlflowServer

# The same examples in every run, however busy the machine: a change must not fail by luck.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")
# For the small networks of the tests, one thread is faster than several, and reproducible.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A server would start eight more processes, which nothing here needs.
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")

SLOW = ("ray", "slow")
MAX_PROCESSES = 4
"""Most processes of `-n auto`: each may start a Ray cluster and an MLflow server."""


def pytest_xdist_auto_num_workers() -> int:
    """The number of processes of `-n auto`: one a CPU, within limits."""
    return min(len(os.sched_getaffinity(0)), MAX_PROCESSES)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `-n`, begin with the files of most slow tests: no process then waits at the end.

    Those of `distributed` come before all others. Their clusters ask for no token, and a process
    that has started Ray for itself expects one from then on.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        slow = Counter(item.path for item in items if any(map(item.get_closest_marker, SLOW)))
        # Sorting keeps the order within a file.
        items.sort(key=lambda item: (item.path.parent.name != "distributed", -slow[item.path]))


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """pytest's fixture, with the messages of this package alone.

    A thread that Ray or MLflow has left in the process may log at any time.
    """
    ours = logging.Filter("ser_ray")
    caplog.handler.addFilter(ours)
    yield caplog
    caplog.handler.removeFilter(ours)


PLAIN = AugmentConfig(
    noise=0, echo=0, band_limit=0, mix_style=0, gain_db=0, time_masks=0, freq_masks=0, mixup=0
)
"""No augmentation but the random crop."""


class MemoryCard(SimpleNamespace):
    """The part of a `ShardCard` that a training reads; tests change it."""

    encoders: tuple[EncoderCard, ...] = ()
    encoder_of: Any = ShardCard.encoder_of
    shape_of: Any = ShardCard.shape_of
    num_bins: Any = ShardCard.num_bins
    num_rows: Any = ShardCard.num_rows
    fingerprint_of: Any = ShardCard.fingerprint_of


@dataclass
class MemoryShards:
    """A shard set in memory: what `ser_ray.shards.read.ShardSet` offers to a training.

    Every emotion is a band of its own frequency, every speaker a level, plus noise: learnable.
    """

    table: pa.Table
    values: np.ndarray
    card: MemoryCard
    uri: str = "memory"
    locations: tuple[str, ...] = ("memory",)
    corpora: tuple[UsedCorpus, ...] = ()
    num_clips = ShardSet.num_clips

    def clips(self) -> pa.Table:
        return self.table

    def features(self, kind: str, rows: np.ndarray | None = None) -> np.ndarray:
        return self.values if rows is None else self.values[rows]


def make_memory_shards(
    speakers: int = 6, per_emotion: int = 2, num_frames: int = 24, emotions: int = 4, seed: int = 0
) -> MemoryShards:
    rng = np.random.default_rng(seed)
    features = FeatureConfig(num_mels=16, num_mfcc=16)
    labels = EMOTIONS[:emotions]
    rows, values = [], []
    for speaker in range(1, speakers + 1):
        for index, emotion in enumerate(labels):
            for repetition in range(per_emotion):
                length = int(rng.integers(num_frames // 2, num_frames + 1))
                clip = np.zeros((16, num_frames), np.float16)
                clip[:, :length] = rng.normal(speaker, 2.0, (16, length))
                clip[3 * index : 3 * index + 3, :length] += 12
                values.append(clip)
                take = f"{speaker:02d}-{index}-{repetition}"
                rows.append(
                    {
                        "path": f"/{take}.wav", "take": take, "modality": "audio", "window": 0,
                        "channel": "speech", "emotion": emotion, "speaker": f"{speaker:02d}",
                        "sex": "male" if speaker % 2 else "female", "content": take,
                        "num_frames": length,
                    }
                )  # fmt: skip
    half = len(rows) // 2
    card = MemoryCard(
        labels=labels, features=features, corpus="table", source="own.csv", fingerprint="f00d",
        shard_sizes=(half, len(rows) - half), counts={"ok": len(rows)},
    )  # fmt: skip
    table, whole = pa.Table.from_pylist(rows), pa.nulls(len(rows), pa.float64())  # not segments
    table = table.append_column("start", whole).append_column("end", whole)
    return MemoryShards(table, np.stack(values), card)


def cut_into_windows(memory: MemoryShards, times: np.ndarray) -> MemoryShards:
    """The shards with each clip as so many equal windows [clips]."""
    rows = np.repeat(np.arange(len(memory.table)), times)
    window = np.concatenate([np.arange(count) for count in times])
    place = memory.table.schema.get_field_index("window")
    table = memory.table.take(rows).set_column(place, "window", pa.array(window))
    return replace(memory, table=table, values=memory.values[rows])


@pytest.fixture
def memory_shards() -> MemoryShards:
    return make_memory_shards()


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run the test in an empty directory, where the program's default output goes."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings in the test's process have a network that takes little time, for 16 bins."""
    from tests.models import SmallNetwork  # it imports torch, which most tests do not need

    monkeypatch.setattr("ser_ray.training.model.ResNet18", SmallNetwork)


@pytest.fixture(scope="session")
def _session_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator["MlflowServer"]:
    from tests.mlflow_server import MlflowServer
    from tests.processes import held_port

    with held_port() as port:
        server = MlflowServer(tmp_path_factory.mktemp("mlflow"), port)
        yield server
        server.stop()


@pytest.fixture
def mlflow_server(
    _session_server: "MlflowServer", monkeypatch: pytest.MonkeyPatch
) -> "MlflowServer":
    """The one MLflow server of the session, running; a test may stop and start it."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")  # the machine may be busy
    _session_server.start()
    return _session_server


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model, for tests that need any model."""
    from tests.models import make_checkpoint  # it imports torch, which most tests do not need

    directory = tmp_path_factory.mktemp("model")
    make_checkpoint(directory)
    return directory


@pytest.fixture(scope="module")
def predictor(checkpoint: Path) -> "Predictor":
    """A predictor with that model."""
    from ser_ray.inference.predictor import Predictor

    return Predictor(checkpoint)
