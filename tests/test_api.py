"""`ser_ray` from Python, run as the cells of a notebook."""

import ast
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import ser_ray
from ser_ray import RunConfig, open_shards
from ser_ray.errors import ConfigError
from tests.clips import voice, write_wav
from tests.models import LABELS
from tests.shard_files import write_shard_files

CELLS = (
    "import ser_ray",
    "model = ser_ray.load_model(MODEL)\nmodel",
    "answer = model.predict('a.wav')\nanswer",
    "answers = model.predict(['a.wav', 'b.wav'])\nanswers",
    "table = answers.to_pandas()\ntable",
    "import soundfile\nsamples, rate = soundfile.read('a.wav')\nmodel.predict(samples, rate)",
)


def run_cell(cell: str, names: dict[str, Any]) -> Any:
    """Run a cell and return the value of its last line, which a notebook shows."""
    *lines, last = ast.parse(cell).body
    if not isinstance(last, ast.Expr):
        return exec(cell, names)
    exec(compile(ast.Module(lines, []), "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def test_a_notebooks_cells_name_emotions_and_draw_them(in_tmp, checkpoint):
    for seed, name in enumerate("ab"):
        write_wav(in_tmp / f"{name}.wav", voice(1.0, 16_000, seed), 16_000)
    names: dict[str, Any] = {"MODEL": checkpoint}
    shown = [run_cell(cell, names) for cell in CELLS]
    assert repr(shown[1]).startswith("ResNet18 on mel, trained on ")
    assert repr(shown[1]).endswith(f"labels: {', '.join(LABELS)}")
    answer, answers, table, from_samples = shown[2:]
    assert [item.path for item in answers] == ["a.wav", "b.wav"]
    assert list(table["emotion"]) == [item.emotion for item in answers]
    assert table[f"p_{answer.emotion}"][0] == pytest.approx(answer.probabilities[answer.emotion])
    assert from_samples.probabilities == pytest.approx(answer.probabilities, abs=1e-3)
    assert answer.emotion in answer._repr_html_()
    for drawn in (answers, table):
        assert "<table" in drawn._repr_html_()


def test_no_library_asks_a_notebook_for_ipywidgets():
    cell = (
        "import sys\n"
        "from types import SimpleNamespace\n"
        "from unittest.mock import MagicMock\n"
        "shell = type('ZMQInteractiveShell', (MagicMock,), {})()\n"
        "sys.modules['IPython'] = SimpleNamespace(get_ipython=lambda: shell)\n"
        "sys.modules['ipywidgets'] = None\n"
        "sys.modules['ipykernel.zmqshell'] = SimpleNamespace()\n"
        "import ser_ray\n"
        "ser_ray.prepare\n"
        "import ray.data, tqdm.auto\n"
    )
    done = subprocess.run([sys.executable, "-c", cell], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_a_notebook_completes_the_functions_and_shows_what_shards_hold(memory_shards, tmp_path):
    assert set(dir(ser_ray)) == {*ser_ray.__all__, "__version__"}
    folder = write_shard_files(tmp_path / "a", memory_shards, ("mel",))
    assert repr(ser_ray.open_shards(folder)) == (
        f"{folder}: 48 rows, 4 labels (neutral, calm, happy, sad), features spectrogram, mel, mfcc"
    )
    other = write_shard_files(tmp_path / "b", memory_shards, ("mel",))
    assert repr(ser_ray.open_shards([folder, other])).startswith(f"{folder} and {other}: 96 rows")


@pytest.mark.parametrize(
    ("function", "required"),
    [
        ("prepare", {"config"}), ("train", set()), ("tune", set()), ("crossval", set()),
        ("lr_range", set()), ("evaluate", {"model"}), ("download", set()), ("refit", {"result"}),
        ("export", {"model"}), ("register", {"run_id"}), ("predict_to_table", {"files", "model"}),
    ],
)  # fmt: skip
def test_nothing_is_required_that_has_a_default(function, required):
    parameters = inspect.signature(getattr(ser_ray, function)).parameters.values()
    assert {item.name for item in parameters if item.default is item.empty} == required
    assert set(ser_ray.__all__) >= {function}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"device": "cuda"}, "device is 'cuda': it must be 'auto' or 'cpu' or 'gpu'"),
        ({"workers": 2}, "workers is 2: it must be str"),
        ({"max_failures": "3"}, "max_failures is '3': it must be int"),
    ],
)
def test_a_setting_of_the_wrong_type_is_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig(**setting)


def test_shards_are_named_by_a_path_or_several(memory_shards, tmp_path):
    folder = Path(write_shard_files(tmp_path / "own", memory_shards))
    clips = len(memory_shards.table)
    assert len(open_shards(folder).clips()) == len(open_shards([folder]).clips()) == clips


def test_an_installation_has_every_file_of_the_package_and_its_types():
    package = Path(ser_ray.__file__).parent
    settings = tomllib.loads(package.with_name("pyproject.toml").read_text(encoding="utf-8"))
    data = settings["tool"]["setuptools"]["package-data"]
    installed = {
        file
        for name, patterns in data.items()
        for pattern in patterns
        for file in package.parent.joinpath(*name.split(".")).glob(pattern)
    }
    others = {
        file for file in package.rglob("*") if file.is_file() and "__pycache__" not in str(file)
    }
    assert installed == {f for f in others if f.suffix != ".py" and f.name != "README.md"}
    assert package / "py.typed" in installed
