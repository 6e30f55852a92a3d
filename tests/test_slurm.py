"""The SLURM script, run with programs that stand in for SLURM's and Ray's."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".slurm" / "ray.sh"
PROGRAMS = {
    "scontrol": "printf '%s\\n' localhost other",
    "srun": 'echo "srun $*" >> "$CALLS"; exec sleep 60',
    "ray": '[[ $(grep -c srun "$CALLS") == 2 ]]',  # its status, once both steps have started
    "python": "true",
}


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in PROGRAMS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"),
        "HOME": str(tmp_path), "RAY_AUTH_TOKEN": "secret", "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_CPUS_PER_TASK": "16",
        "SLURM_GPUS_ON_NODE": "2",
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "calls"


def submit(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), *command], capture_output=True, text=True, timeout=60, check=False
    )


def test_ray_starts_on_every_node_and_the_job_ends_as_the_command_does(calls: Path) -> None:
    done = submit("bash", "-c", "echo $RAY_ADDRESS $RAY_AUTH_MODE; exit 7")
    assert done.returncode == 7, done.stderr
    assert done.stdout == "127.0.0.1:23456 token\n"
    told = calls.read_text()
    size = "--num-cpus 16 --num-gpus 2"
    head = next(line for line in told.splitlines() if "--head" in line)
    assert "--nodes 1 --ntasks 1 --nodelist localhost" in head
    assert "--node-ip-address 127.0.0.1 --port 23456" in head
    assert head.endswith(size)
    others = next(line for line in told.splitlines() if "--exclude" in line)
    assert "--nodes 2 --ntasks 2 --exclude localhost" in others
    assert others.endswith(f"ray start --block --address 127.0.0.1:23456 {size}")


def test_it_does_not_start_without_a_token_or_a_command(
    calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert submit().returncode == 2
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    done = submit("true")
    assert done.returncode == 2
    assert "ray get-auth-token --generate" in done.stderr
    assert not calls.exists()
