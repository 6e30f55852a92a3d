"""A few rounds of fault injection: each is survived, with the same result as without a fault."""

import json
import os
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
    assert any(entry["thrown"] for entry in rounds)
