"""Several nodes: a head that only drives and raylets of one CPU each, so that tasks must spread."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ser_ray.cluster.shared_files import require_shared
from ser_ray.distributed.run_config import RunConfig
from ser_ray.distributed.train import train
from ser_ray.errors import ResourcesError
from ser_ray.features.config import FeatureConfig
from ser_ray.shards.config import PrepareConfig
from ser_ray.shards.prepare import prepare
from ser_ray.training.recipe import TrainConfig
from tests.clips import six_speakers, small_corpus
from tests.processes import family

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*"),
]
FEATURES = FeatureConfig(num_mels=40, max_seconds=2.0)


class Nodes:
    """A cluster whose nodes are raylets of this machine."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        self.workers: list[Any] = []

    def grow(self, count: int) -> None:
        """Add nodes of one CPU until there are so many."""
        while len(self.workers) < count:
            self.workers.append(self.cluster.add_node(num_cpus=1))
        self.cluster.wait_for_nodes()

    def lose(self, node: Any) -> None:
        """Kill a node as a cloud takes a spot machine back."""
        self.workers.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def running(self, title: str) -> list[Any]:
        """The nodes that run a process of this title."""
        raylets = {node: node.all_processes["raylet"][0].process.pid for node in self.workers}
        return [node for node, pid in raylets.items() if title in " ".join(family(pid).values())]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    import ray

    found = Nodes()
    ray.init(address=found.cluster.address, log_to_driver=False)
    yield found
    ray.shutdown()
    found.cluster.shutdown()


def test_a_lost_node_costs_a_preparation_nothing(nodes, tmp_path):
    corpus = small_corpus(tmp_path / "corpus", num_wavs=400)  # parts of a tenth of a second
    nodes.grow(3)
    most, lost = 0, False

    def make(target: Path) -> dict[str, bytes]:
        config = PrepareConfig(corpus=str(corpus), shards=str(target), features=FEATURES)
        prepare(config, progress=lose_one)
        return {
            str(path.relative_to(target)): path.read_bytes() for path in target.glob("*/shard-*")
        }

    def lose_one(*_: object) -> None:
        nonlocal lost, most
        most = max(most, len(nodes.running("ser_ray.features.sandbox")))
        if not lost:
            lost = True
            nodes.lose(nodes.workers[0])

    lossy = make(tmp_path / "lossy")
    assert lost
    assert most >= 2  # nodes, which have room for one part each
    assert lossy == make(tmp_path / "whole")


def test_a_training_on_several_nodes_outlives_one(nodes, tmp_path):
    corpus = six_speakers(tmp_path / "corpus")
    nodes.grow(3)
    shards = str(tmp_path / "shards")
    prepare(PrepareConfig(corpus=str(corpus), shards=shards, features=FEATURES))
    used: list[int] = []

    def lose_one(row: dict[str, float]) -> None:
        if not used:
            working = nodes.running("RayTrainWorker")
            used.append(len(working))
            nodes.lose(working[0])

    result = train(
        shards,
        TrainConfig(epochs=4, batch_size=8, crop_frames=32, weights="none", protocol="speaker-3"),
        RunConfig(
            workers="2",
            storage=str(tmp_path / "runs"),
            tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}",  # lives with the driver
        ),
        on_epoch=lose_one,
    )
    assert used == [2]
    assert [row["epoch"] for row in result.history] == [1, 2, 3, 4]
    from mlflow import MlflowClient

    run = MlflowClient(result.tracking_uri).get_run(result.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["val/ua"] == result.history[-1]["val/ua"]


@contextlib.contextmanager
def apart(nodes: Nodes, folder: Path, count: int = 1, num_cpus: int = 0) -> Iterator[None]:
    """More nodes, each with a name and, where the folder is, a disk of its own."""
    import ray

    hidden = f"mount -t tmpfs none {folder} && hostname elsewhere"
    unshare = ["unshare", "--mount", "--uts", "sh", "-c"]
    if subprocess.run([*unshare, hidden], capture_output=True).returncode:
        pytest.skip("this user may not mount in a namespace of its own")
    start = f"{Path(sys.executable).parent}/ray start --address={nodes.cluster.address}"
    started: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            known = {node["NodeID"] for node in ray.nodes()}
            started.append(
                subprocess.Popen(
                    [*unshare, f"{hidden} && exec {start} --block --num-cpus={num_cpus}"],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
            while {node["NodeID"] for node in ray.nodes()} == known:
                assert started[-1].poll() is None, "the node did not start"
                time.sleep(0.2)
        yield
    finally:
        for node in started:
            node.terminate()
        for node in started:
            node.wait(60)


def test_a_path_that_a_node_does_not_see_is_refused(nodes, tmp_path, tmp_path_factory):
    own = tmp_path / "own"
    corpus, shards = str(own / "corpus"), own / "shards"
    own.mkdir()
    require_shared(str(own))  # the nodes so far share this machine's disk
    shared = tmp_path_factory.mktemp("shared")
    table, blind = shared / "table.csv", "is on this machine, but not on elsewhere"
    with apart(nodes, tmp_path):
        small_corpus(own / "corpus", num_wavs=2)
        with pytest.raises(ResourcesError, match=blind):
            prepare(PrepareConfig(corpus=corpus, shards=str(shards)))
        assert not list(shards.glob("*.parquet"))
        table.write_text(f"path,label,speaker\n{next((own / 'corpus').rglob('*.wav'))},joy,a\n")
        with pytest.raises(ResourcesError, match=rf"\.wav {blind}"):
            prepare(PrepareConfig(corpus=str(table), shards=str(shared / "shards")))
        assert not list((shared / "shards").glob("*.parquet"))
        assert not list(own.rglob(".seen-by-all-*"))
        require_shared("s3://a-bucket/anything")


def test_only_the_driver_sees_the_database_of_its_runs(nodes, tmp_path):
    corpus, shards = six_speakers(tmp_path / "corpus"), str(tmp_path / "shards")
    database = tmp_path / "own" / "mlflow.db"
    database.parent.mkdir()
    for node in list(nodes.workers):
        nodes.lose(node)
    with apart(nodes, database.parent, count=2, num_cpus=1):
        prepare(PrepareConfig(corpus=str(corpus), shards=shards, features=FEATURES))
        with pytest.raises(ResourcesError, match="but not on elsewhere, elsewhere"):
            require_shared(str(database.parent))
        result = train(
            shards,
            TrainConfig(
                epochs=1, batch_size=8, crop_frames=32, weights="none", protocol="speaker-3"
            ),
            RunConfig(
                workers="2",
                storage=str(tmp_path / "runs"),
                tracking_uri=f"sqlite:///{database}",
            ),
            on_epoch=lambda row: None,
        )
    from mlflow import MlflowClient

    run = MlflowClient(result.tracking_uri).get_run(result.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["val/ua"] == result.history[-1]["val/ua"]
