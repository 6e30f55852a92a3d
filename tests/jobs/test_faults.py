"""A few rounds of fault injection: each is survived, with the same result as without a fault.

The clock that can jump is tested alone, because a round does not show that it has jumped.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "jobs" / "bench.py"
FAULTS = ("kill driver", "kill worker", "terminate driver", "two drivers")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_preparation_survives_what_is_thrown_at_it(tmp_path: Path) -> None:
    log = tmp_path / "faults.jsonl"
    command = [sys.executable, str(BENCH), "faults", "--seed", "1", "--rounds", "3"]
    done = subprocess.run(
        [*command, "--log", str(log), "--work", "prepare", "--faults", *FAULTS],
        env=os.environ | {"PYTHONPATH": str(BENCH.parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rounds = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(rounds) == 3
    assert [entry["problems"] for entry in rounds] == [[], [], []]
    assert any(entry["injected"] for entry in rounds)


def test_the_disk_of_this_machine_is_never_filled(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH), "faults", "--faults", "full disk"]
    done = subprocess.run(
        [*command, "--log", str(tmp_path / "log"), "--rounds", "0"],
        env=os.environ | {"PYTHONPATH": str(BENCH.parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "--faults: full disk needs --storage small-disk"


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_only_the_system_clock_of_a_process_and_its_children_jumps(tmp_path: Path) -> None:
    library, offset = tmp_path / "clock.so", tmp_path / "offset"
    source = BENCH.with_name("faults_clock.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    offset.write_bytes(bytes(8))
    program = """
import subprocess, sys, time
from pathlib import Path

def clocks():
    child = [sys.executable, "-c", "import time; print(time.time())"]
    in_child = float(subprocess.run(child, capture_output=True, check=True).stdout)
    return time.time(), in_child, time.monotonic()

before = clocks()
with Path(sys.argv[1]).open("r+b") as file:
    file.write((-3600).to_bytes(8, sys.byteorder, signed=True))
time.sleep(0.1)
print([later - earlier for earlier, later in zip(before, clocks())])
"""
    environment = {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(offset)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(offset)],
        env=os.environ | environment,
        capture_output=True,
        check=True,
    )
    here, in_child, monotonic = json.loads(done.stdout)
    assert -3600 < here < -3540
    assert -3600 < in_child < -3540
    assert 0.1 <= monotonic < 60


def test_a_clock_that_cannot_jump_is_said_to_need_a_compiler(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH), "faults", "--faults", "driver clock"]
    done = subprocess.run(
        [*command, "--log", str(tmp_path / "faults.jsonl")],
        env=os.environ | {"PYTHONPATH": str(BENCH.parents[1]), "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "'driver clock' is not injected: it needs a C compiler: install gcc" in done.stdout
    assert "no fault can be injected" in done.stderr
