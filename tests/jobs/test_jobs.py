"""Jobs on a real cluster: a head with its job server and MLflow, and a worker.

Both are nodes on this machine, started by the commands of cluster.yaml with other ports and places,
and with the token of a separate home directory.
"""

import configparser
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from ser_ray.shards.layout import CLIPS, OUTCOMES
from ser_ray.storage.lock import LOCK_NAME
from tests.clips import six_speakers
from tests.processes import end, family, held_port, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
RECIPE = [
    "--weights",
    "none",
    "--crop-frames",
    "32",
    "--batch-size",
    "8",
    "--protocol",
    "speaker-3",
]
TOKEN = "0123456789abcdef" * 4
SECRET = "AKIA0SECRET0SECRET"


@dataclass
class Head:
    """A running head node and what a user of it has."""

    processes: list[subprocess.Popen[bytes]]
    """Those that all others of Ray come from: the head's and the worker's."""
    env: dict[str, str]
    gcs: str
    jobs: str
    mlflow: str
    temp: Path

    def run(self, *arguments: str | Path, **changes: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment as the user."""
        return subprocess.run(
            [BIN / str(arguments[0]), *map(str, arguments[1:])],
            env=self.env | changes,
            capture_output=True,
            text=True,
            cwd=self.env["HOME"],
        )

    def login(self) -> tuple[str, str]:
        """MLflow's user and password, of the head's own making."""
        known = configparser.ConfigParser()
        known.read(Path(self.env["HOME"], ".mlflow", "credentials"))
        user, password = known["mlflow"].values()
        return user, password

    def submit(self, clone: Path, job: str, *options: str | Path) -> list[str | Path]:
        """The command that submits a job from a clone."""
        submit = ("ray", "job", "submit", "--address", self.jobs, "--working-dir", clone)
        return [*submit, "--", "python", f"jobs/{job}.py", *options]

    def submissions(self) -> list[Any] | None:
        """The jobs submitted so far, for who has the token; None while nothing answers."""
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with contextlib.suppress(requests.RequestException):
            answer = requests.get(f"{self.jobs}/api/jobs/", headers=headers, timeout=60)
            return answer.json() if answer.ok else None
        return None

    def runs(self) -> dict[str, dict[str, Any]]:
        """What MLflow holds, by name, for who has the password."""
        answer = requests.post(
            f"{self.mlflow}/api/2.0/mlflow/runs/search",
            json={"experiment_ids": ["1"]},
            auth=self.login(),
            timeout=60,
        ).json()
        return {run["info"]["run_name"]: run for run in answer.get("runs", ())}

    def working(self) -> list[str]:
        """The processes of jobs."""
        ours = ("RayTrainWorker", "TrainController", "JobSupervisor", "jobs/")
        commands = [line for node in self.processes for line in family(node.pid).values()]
        return [command for command in commands if any(word in command for word in ours)]


@pytest.fixture(scope="module")
def ports() -> Iterator[list[int]]:
    """Of the GCS, the job server, MLflow, Ray's client server, and two for each node's agents."""
    with contextlib.ExitStack() as held:
        yield [held.enter_context(held_port()) for _ in range(8)]


@pytest.fixture(scope="module")
def head(ports: list[int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """Started by cluster.yaml's commands, and stopped by the ids of its processes."""
    home, store = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("store")
    # Ray's sockets need short paths. Nodes that shared a folder would replace each other's copy of
    # the code, which is the working folder of the jobs.
    temp, workers_temp = (Path(tempfile.mkdtemp(prefix="ray-")) for _ in range(2))
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(TOKEN)
    gcs, jobs, mlflow, client, *agent = ports
    changes = {
        "~/venv/bin": str(BIN),
        "~/ser-ray": str(ROOT),
        "s3://my-bucket/mlflow": f"{store} --port {mlflow}",
        "127.0.0.1:5000": f"127.0.0.1:{mlflow}",
        "--port=6379": f"--port={gcs} --num-cpus=0 --temp-dir={temp} --dashboard-port={jobs} "
        f"--ray-client-server-port={client} {agent_ports(*agent[:2])}",
        "$RAY_HEAD_IP:6379": f"$RAY_HEAD_IP:{gcs} --num-cpus=2 --temp-dir={workers_temp} "
        f"{agent_ports(*agent[2:])}",
        "--autoscaling-config=~/ray_bootstrap_config.yaml": "",  # no machines to start here
    }
    inherited = {k: value for k, value in os.environ.items() if not k.startswith("RAY_")}
    env = inherited | {
        "HOME": str(home),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "UV_CACHE_DIR": os.environ.get("UV_CACHE_DIR", str(Path.home() / ".cache" / "uv")),
    }
    env.pop("PYTHONPATH", None)
    serve, start, join = commands_of_cluster_yaml(changes)
    tracking = f"http://127.0.0.1:{mlflow}"
    found = Head([], env, f"127.0.0.1:{gcs}", f"http://127.0.0.1:{jobs}", tracking, temp)

    def start_node(command: str) -> None:
        log = home / f"node-{len(found.processes)}.log"
        with log.open("w") as file:
            node = subprocess.Popen(
                ["bash", "-c", command],
                env=env | {"RAY_HEAD_IP": "127.0.0.1"},
                stdout=file,
                stderr=file,
            )
        found.processes.append(node)
        wait_for("a node", lambda: "runtime started" in log.read_text() or node.poll() is not None)
        assert node.poll() is None, log.read_text()

    try:
        subprocess.run(["bash", "-c", serve], env=env, check=True)
        wait_for("MLflow", lambda: answers(f"{tracking}/health"))
        start_node(start)
        start_node(join)
        wait_for("the job server", lambda: found.submissions() is not None)
        yield found
    finally:
        for node in found.processes:
            end(node)
        holder = store / LOCK_NAME
        if holder.exists():
            os.kill(json.loads(holder.read_text())["pid"], signal.SIGTERM)
        wait_for("MLflow's end", lambda: not holder.exists(), 60)
        for folder in (temp, workers_temp):
            shutil.rmtree(folder, ignore_errors=True)


def agent_ports(http: int, grpc: int) -> str:
    return f"--block --dashboard-agent-listen-port={http} --dashboard-agent-grpc-port={grpc}"


def commands_of_cluster_yaml(changes: dict[str, str]) -> list[str]:
    """What starts MLflow, the head and a worker, with other places and ports; each is used."""
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    stop, *head = config["head_start_ray_commands"]
    stop_worker, *worker = config["worker_start_ray_commands"]
    assert stop == stop_worker == "~/venv/bin/ray stop"  # would stop every Ray of this machine
    commands = "\0".join(head + worker)
    for old, new in changes.items():
        assert old in commands
        commands = commands.replace(old, new)
    return commands.split("\0")


def answers(url: str) -> bool:
    with contextlib.suppress(requests.RequestException):
        return requests.get(url, timeout=30).ok
    return False


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in which somebody has worked: it holds results, an environment and keys."""
    target = tmp_path_factory.mktemp("clone")
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split():
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    for big in ("ser-ray-out/shards/shard-00000.parquet", ".venv/lib/libtorch.so"):
        (target / big).parent.mkdir(parents=True)
        with (target / big).open("wb") as file:
            file.truncate(200 << 20)
    (target / ".env").write_text(f"AWS_SECRET_ACCESS_KEY={SECRET}")
    (target / "ser-ray.pem").write_text(SECRET)
    return target


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cluster's storage, with a corpus of four emotions of six speakers."""
    target = tmp_path_factory.mktemp("shared")
    six_speakers(target / "corpus")
    return target


@pytest.fixture(scope="module")
def shards(head: Head, clone: Path, shared: Path) -> Path:
    """Made by a submitted job, which also shows what a submission prints."""
    target = shared / "shards"
    done = head.run(
        *head.submit(clone, "prepare", "--corpus", shared / "corpus", "--shards", target)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "24 files: 24 ok" in done.stdout
    return target


def test_a_submitted_training_is_followed_and_recorded(head, clone, shared, shards):
    done = head.run(
        *head.submit(clone, "train", "--shards", shards, "--storage", shared / "runs", *RECIPE),
        *("--epochs", "2", "--name", "submitted"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "epoch   1/2" in done.stdout  # followed while it ran
    assert f"checkpoint   {shared / 'runs' / 'submitted' / 'selected'}" in done.stdout
    assert (shared / "runs" / "submitted" / "selected").is_dir()
    run = head.runs()["submitted"]
    assert run["info"]["status"] == "FINISHED"
    tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
    assert tags["command"].startswith("train.py --shards")
    everything = json.dumps(run) + done.stdout + done.stderr
    assert TOKEN not in everything
    assert head.login()[1] not in everything


@pytest.mark.soak
def test_the_upload_is_the_code_and_nothing_else(head, clone, shards):
    packages = [path for path in head.temp.rglob("_ray_pkg_*") if path.is_dir()]
    assert packages
    for package in packages:
        files = [path for path in package.rglob("*") if path.is_file()]
        assert {"ser_ray", "jobs"} <= {path.name for path in package.iterdir()}
        assert sum(path.stat().st_size for path in files) < 3 << 20
        assert not [path for path in files if SECRET.encode() in path.read_bytes()]


@pytest.mark.soak
@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "prepare --corpus /nowhere --shards {shared}/none",
            "/nowhere: this folder or table does not exist",
        ),
        (
            "prepare --corpus {shared}/corpus --shards ser-ray-out/out",
            "which Ray deletes after the job",
        ),
        ("download", "which Ray deletes after the job"),
        ("export {shared}/no-model", "which Ray deletes after the job"),
    ],
)
def test_what_a_user_gets_wrong_fails_the_job_and_says_so(head, clone, shared, command, message):
    done = head.run(*head.submit(clone, *command.format(shared=shared).split()))
    assert done.returncode != 0
    assert message in done.stdout


@pytest.mark.soak
@pytest.mark.parametrize("token", ["", "f" * 64])
def test_without_the_token_a_submission_is_refused(head, clone, shared, tmp_path, token):
    before = head.submissions()
    changes = {"HOME": str(tmp_path)} | ({"RAY_AUTH_TOKEN": token} if token else {})
    done = head.run(*head.submit(clone, "prepare", "--shards", shared / "no"), **changes)
    assert done.returncode != 0
    assert "AuthenticationError" in done.stderr
    assert requests.get(f"{head.jobs}/api/jobs/", timeout=30).status_code in (401, 403)
    assert head.submissions() == before


def test_a_stopped_job_leaves_nothing_behind(head, clone, shared, shards):
    log = shared / "stopped.log"
    command = head.submit(clone, "train", "--shards", shards, "--storage", shared / "runs")
    command[3:3] = ["--submission-id", "stopped"]
    options = [*RECIPE, "--epochs", "500", "--name", "stopped"]
    with log.open("w") as file:
        following = subprocess.Popen(
            [BIN / "ray", *map(str, [*command[1:], *options])],
            env=head.env,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    wait_for("the second epoch", lambda: "epoch   2/500" in log.read_text())
    assert head.working()
    assert head.run("ray", "job", "stop", "--address", head.jobs, "stopped").returncode == 0
    following.wait(120)  # cluster.yaml lets a stopped job end its run for 60 seconds
    wait_for("the end of its processes", lambda: not head.working(), 60)
    assert head.runs()["stopped"]["info"]["status"] == "KILLED"


@pytest.mark.soak
def test_no_log_holds_a_secret(head, shards):
    logs = [path for path in head.temp.glob("session_2*/logs/**/*") if path.is_file()]
    logs += Path(head.env["HOME"]).glob("*.log")
    assert {"mlflow.log", "node-0.log", "gcs_server.out"} <= {path.name for path in logs}
    for secret in (TOKEN, head.login()[1]):
        assert not [path for path in logs if secret.encode() in path.read_bytes()]


@pytest.mark.soak
def test_the_command_line_joins_the_same_cluster(head, shared, shards):
    """From a folder without the code, and to shards that are not there: its workers write them."""
    target = shared / "joined"
    done = head.run(
        *("ser-ray", "prepare", "--address", head.gcs, "--corpus", shared / "corpus"),
        *("--shards", target, "--json"),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["clips"] == 24
    parts = sorted(path.relative_to(shards) for path in shards.rglob("shard-*.parquet"))
    assert {part.parts[0] for part in parts} == {CLIPS, OUTCOMES}
    for part in parts:
        assert (target / part).read_bytes() == (shards / part).read_bytes()


@pytest.mark.soak
def test_the_job_servers_address_is_for_submissions_alone(head, clone, shared):
    """As README sets it: jobs go there, and a command in the same shell has its own Ray."""
    server = {"RAY_API_SERVER_ADDRESS": head.jobs}
    listed = head.run("ray", "job", "list", **server)
    assert listed.returncode == 0, listed.stderr
    options = ("--corpus", shared / "corpus", "--shards", shared / "alone")
    refused = head.run("ser-ray", "prepare", *options, RAY_ADDRESS=head.jobs)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith(f"error: {head.jobs} is a job server")
    done = head.run("ser-ray", "prepare", *options, **server)
    assert done.returncode == 0, done.stderr


@pytest.mark.soak
def test_a_job_brings_its_packages_to_a_cluster_that_has_others(head, clone, shared):
    """By uv, from pyproject.toml; last, as it fills the copy that all jobs of the clone run in."""
    command = head.submit(
        clone, "prepare", "--corpus", shared / "corpus", "--shards", shared / "own"
    )
    at = command.index("--") + 1
    done = head.run(*command[:at], "uv", "run", *command[at:])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "24 files: 24 ok" in done.stdout
    assert list(head.temp.glob("session_2*/runtime_resources/working_dir_files/*/.venv/bin/ray"))
