"""The rooms and which way imports go, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ser_ray"
ORDER = ["corpus", "features", "shards", "training", "inference"]
RAY_FREE = [
    "features/*.py", "training/config.py", "training/data.py", "training/augment.py",
    "training/model.py", "training/loop.py", "training/metrics.py", "training/checkpoint.py",
    "training/scoring.py", "training/stream.py", "training/world.py",
    "training/run_folder.py", "training/lr_range.py",
    "training/search_config.py", "training/study.py", "training/search_figures.py",
    "training/search_page.py", "training/trial_log.py", "training/study_journal.py",
    "training/display.py", "training/json_lines.py",
    "inference/demo.py", "inference/evaluate.py", "inference/export.py", "inference/hear.py",
    "inference/model_card.py", "inference/network.py", "inference/packaged.py",
    "inference/predict.py", "inference/results.py", "inference/statistics.py", "report.py",
]  # fmt: skip
TOP_LEVEL = {
    "ser_ray", "jobs", "tests", "pyproject.toml", "README.md", "cluster.yaml", "LICENSE",
}  # fmt: skip


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("room", ORDER)
def test_imports_go_left_to_right(room):
    later = {f"ser_ray.{name}" for name in ORDER[ORDER.index(room) + 1 :]}
    for path in (PACKAGE / room).glob("*.py"):
        wrong = {
            name
            for name in imports_of(path)
            if any(name == other or name.startswith(f"{other}.") for other in later)
        }
        assert not wrong, f"{path.name} imports {wrong}"


@pytest.mark.parametrize("pattern", RAY_FREE)
def test_the_loop_and_its_parts_know_nothing_of_ray(pattern):
    paths = list(PACKAGE.glob(pattern))
    assert paths, f"{pattern} matches no file"
    for path in paths:
        wrong = {name for name in imports_of(path) if name.split(".")[0] in ("ray", "mlflow")}
        assert not wrong, f"{path.name} imports {wrong}"


def test_the_loop_needs_torch_and_the_shards_alone():
    """So that it can train on a machine without Ray, and without what decodes sound."""
    program = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in %r:
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
import ser_ray.training.loop
"""
    absent = {"ray", "mlflow", "optuna", "soxr", "av", "soundfile", "matplotlib", "rich", "tyro"}
    subprocess.run([sys.executable, "-c", program % absent], check=True)


def test_only_the_tracker_and_the_registry_import_mlflow():
    importing = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == "mlflow" for name in imports_of(path))
    }
    assert importing == {"tracking.py", "registry.py"}


def test_the_top_level_holds_what_the_design_names():
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    tops = {name.split("/")[0] for name in tracked}
    assert {name for name in tops if not name.startswith(".")} <= TOP_LEVEL
