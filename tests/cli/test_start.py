"""The entry point gives Python huge pages where the kernel waits for a request, and rare
collections."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ser_ray.cli import start

ROOT = Path(__file__).parents[2]
SHOW = """
import os, sys
from pathlib import Path
from ser_ray.cli import main, start
start.KERNEL_MODE = Path(sys.argv[1])
main.main = lambda: print(os.getpid(), os.environ.get(start.TUNABLES), *sys.argv[2:])
start.main()
"""


def run(mode, tmp_path, **variables):
    """Start the entry point in a new process; return its id, the variable and the arguments."""
    (tmp_path / "mode").write_text(mode)
    environment = {key: value for key, value in os.environ.items() if key != start.TUNABLES}
    command = [sys.executable, "-c", SHOW, str(tmp_path / "mode"), "train", "--name", "a b"]
    process = subprocess.Popen(
        command, env=environment | variables, stdout=subprocess.PIPE, text=True
    )
    output, _ = process.communicate()
    assert process.returncode == 0
    process_id, value, *words = output.split()
    assert int(process_id) == process.pid, "the process keeps its id, so signals still reach it"
    assert words == ["train", "--name", "a", "b"]
    return value


@pytest.mark.parametrize(
    ("mode", "value"),
    [
        ("always [madvise] never\n", start.HUGE_PAGES),
        ("[always] madvise never\n", "None"),
        ("always madvise [never]\n", "None"),
    ],
)
def test_huge_pages_are_requested_where_the_kernel_waits_for_a_request(mode, value, tmp_path):
    assert run(mode, tmp_path) == value


def test_the_users_own_variable_stays(tmp_path):
    tunables = "glibc.malloc.check=0"
    assert run("always [madvise] never\n", tmp_path, GLIBC_TUNABLES=tunables) == tunables


def test_a_system_without_huge_pages_starts_as_always(monkeypatch, tmp_path):
    monkeypatch.delenv(start.TUNABLES, raising=False)
    monkeypatch.setattr(start, "KERNEL_MODE", tmp_path / "missing")
    assert not start.needs_restart()


def test_python_looks_rarely_for_cycles_while_it_imports_and_not_at_its_end():
    script = (
        "import gc; from ser_ray.cli import main, start; start.needs_restart = lambda: False\n"
        "main.main = gc.get_threshold\n"
        "print(start.main()[0], gc.get_freeze_count())"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout
    threshold, frozen = map(int, output.split())
    assert threshold > 50_000
    assert frozen > 1_000


def test_both_commands_start_here():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["ser-ray"] == "ser_ray.cli.start:main"
    assert "from ser_ray.cli.start import main" in (ROOT / "ser_ray/__main__.py").read_text()
