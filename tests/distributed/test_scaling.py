"""cluster.yaml's machines, started when a job needs them and given back when they are idle.

Ray's autoscaler of the version that `ray up` starts, with the kinds of machine, their numbers and
GPUs of cluster.yaml; the provider is Ray's fake one, whose machines are raylets here, of one CPU
each so that they fit. No GPU is there: what a worker does on one, it does on the CPU instead.
"""

import os
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray import cloudpickle
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)
from ray.train.torch import TorchConfig

from ser_ray.cluster import resources
from ser_ray.distributed import worker_group
from ser_ray.distributed.run_config import RunConfig
from ser_ray.distributed.train import train
from ser_ray.shards.config import PrepareConfig
from ser_ray.shards.prepare import prepare
from ser_ray.training.recipe import TrainConfig
from tests.clips import voice, write_wav
from tests.processes import answers_at, held_port, started, wait_for
from tests.shard_files import write_shard_files

pytestmark = [
    pytest.mark.soak,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*"),
]
ROOT = Path(__file__).parents[2]
IDLE_MINUTES = 0.1
KIND = "ray.io/node-group"


def fake_config(gcs: str) -> dict[str, Any]:
    """cluster.yaml, its cloud replaced by raylets of this machine."""
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    kinds = config["available_node_types"]
    kinds[FAKE_HEAD_NODE_TYPE] = kinds.pop(config["head_node_type"])
    for name, kind in kinds.items():
        kind["node_config"] = {}
        kind["labels"] = {KIND: name}  # which `ray start` sets on a real machine
        kind["resources"]["CPU"] = min(kind["resources"]["CPU"], 1)
    empty: dict[str, Any] = {name: [] for name in config if name.endswith("_commands")}
    empty |= {"initialization_commands": [], "cluster_synced_files": []}
    return (
        config
        | empty
        | {
            "head_node_type": FAKE_HEAD_NODE_TYPE,
            "idle_timeout_minutes": IDLE_MINUTES,
            "provider": {
                "type": "external",
                "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
                "gcs_address": gcs,
                "head_node_id": FAKE_HEAD_NODE_ID,
                "launch_multiple": True,
                "disable_node_updaters": True,
            },
            "auth": {},
            "file_mounts": {},
            "file_mounts_sync_continuously": False,
        }
    )


@pytest.fixture
def gcs() -> Iterator[str]:
    """The address of the head's GCS."""
    with held_port() as port:
        yield f"127.0.0.1:{port}"


@pytest.fixture
def head(gcs: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A head without CPUs that may start the others; this process is its driver."""
    import ray

    temp = Path(tempfile.mkdtemp(prefix="ray-"))  # Ray's sockets need a short path
    config = temp / "ray_bootstrap_config.yaml"
    config.write_text(yaml.safe_dump(fake_config(gcs)))
    monkeypatch.setattr(resources, "AUTOSCALER_CONFIG", config)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")  # its poller would outlive the cluster
    env = os.environ | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        # As `ray up` starts a head; the fake provider wants to know it by this name.
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    start = [f"{Path(sys.executable).parent}/ray", "start", "--head", "--block", "--num-cpus=0"]
    start += ["--node-ip-address=127.0.0.1", f"--port={gcs.rpartition(':')[2]}"]
    start += ["--include-dashboard=false", f"--temp-dir={temp}", f"--autoscaling-config={config}"]
    try:
        with started(start, temp / "head.log", lambda: answers_at(gcs), env=env):
            ray.init(address=gcs, log_to_driver=False)
            try:
                yield
            finally:
                ray.shutdown()
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def machines() -> Counter[str]:
    """Those that are there besides the head, by kind."""
    import ray

    kinds = [node["Labels"].get(KIND) for node in ray.nodes() if node["Alive"]]
    return Counter(kind for kind in kinds if kind not in (None, FAKE_HEAD_NODE_TYPE))


class Watch:
    """The most machines of each kind that there were at a time in its block."""

    def __init__(self) -> None:
        self.most: Counter[str] = Counter()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.look)

    def look(self) -> None:
        while not self.ended.wait(0.1):
            self.most |= machines()

    def __enter__(self) -> "Watch":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that is not on this machine's own disk, as one that all machines mount."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def without_gpu(*task: Any) -> None:
    """Run the training's worker on a machine that has no GPU, although Ray counts one."""
    import torch

    from ser_ray.distributed import worker

    worker.get_device = lambda: torch.device("cpu")
    worker.run_worker(*task)


def test_prepare_gets_cpu_machines_and_train_gpu_machines_and_all_go_back(
    head, shared, monkeypatch
):
    corpus = shared / "corpus"
    for emotion in (1, 2):
        name = f"03-01-{emotion:02d}-01-01-01-01.wav"
        write_wav(corpus / name, (voice(0.5) * 20_000).astype("int16"))
    assert machines() == {}
    with Watch() as watch:
        prepare(PrepareConfig(corpus=str(corpus), shards=str(shared / "prepared")))
    assert watch.most == {"cpu-worker": 2}  # a part each
    wait_for("the CPU machines' end", lambda: not machines())

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(worker_group, "run_worker", without_gpu)
    monkeypatch.setattr(worker_group, "BoundConfig", lambda backend: TorchConfig("gloo"))
    with Watch() as watch:
        result = train(
            write_shard_files(shared / "shards"),
            TrainConfig(
                epochs=1, batch_size=8, crop_frames=16, weights="none", protocol="speaker-3"
            ),
            RunConfig(
                workers="1..2",
                device="gpu",
                storage=str(shared / "runs"),
                tracking_uri=f"sqlite:///{shared / 'mlflow.db'}",
            ),
            on_epoch=lambda row: None,
        )
    assert len(result.history) == 1
    assert watch.most == {"gpu-worker": 2}
    wait_for("the GPU machines' end", lambda: not machines())
