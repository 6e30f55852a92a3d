"""The order of the folders, read from every import of every file."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ser_ray"
ORDER = [
    "version", "errors", "progress", "grouping", "command", "storage", "cluster", "corpus",
    "features", "shards", "training", "plots", "inference", "tracking", "evaluation", "distributed",
    "search", "api", "cli", "__main__",
]  # fmt: skip
"""A folder imports only from itself and from folders to its left."""
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
TOP_LEVEL = {
    "ser_ray", "jobs", "tests", "pyproject.toml", "README.md", "cluster.yaml", "LICENSE",
}  # fmt: skip


def imports_of(file: str) -> set[str]:
    """Dotted names of all that a file imports, at its top or anywhere else."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_of(file: str) -> str:
    return "ser_ray." + file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def folder_of(module: str) -> str:
    return module.split(".")[1]


def modules_in(name: str) -> set[str]:
    """The module that an imported name is, or that holds it."""
    return {name, name.rpartition(".")[0]} & MODULES.keys()


MODULES = {module_of(file): file for file in FILES if file != "__init__.py"}


@pytest.mark.parametrize("file", MODULES.values())
def test_a_folder_imports_only_from_folders_above_it(file):
    place = ORDER.index(folder_of(module_of(file)))
    for name in imports_of(file):
        if name.split(".")[0] == "ser_ray":
            assert name.partition(".")[2].split(".")[0] in ORDER, f"{file} imports {name}"
            assert ORDER.index(folder_of(name)) <= place, f"{file} imports {name}"


def test_no_imports_form_a_circle():
    graph = {
        module: {part for name in imports_of(file) for part in modules_in(name)} - {module}
        for module, file in MODULES.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize(
    ("library", "folders"),
    [
        ("mlflow", {"tracking"}),
        ("ray", set(ORDER) - {"training", "features", "corpus", "plots", "tracking", "evaluation"}),
    ],
)
def test_a_library_is_imported_in_its_folders_alone(library, folders):
    importing = {
        folder_of(module)
        for module, file in MODULES.items()
        if any(name.split(".")[0] == library for name in imports_of(file))
    }
    assert importing <= folders


def test_training_needs_torch_and_the_shards_alone():
    """So that it runs on a machine without Ray, and without what decodes sound."""
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


def test_the_top_level_holds_what_the_design_names():
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    tops = {name.split("/")[0] for name in tracked}
    assert {name for name in tops if not name.startswith(".")} <= TOP_LEVEL
