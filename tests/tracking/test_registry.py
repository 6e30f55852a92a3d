"""What names a model: folders and names of runs. `test_packaged.py` has those that MLflow keeps."""

import shutil

import pytest

from ser_ray.errors import CheckpointError
from ser_ray.tracking.registry import local_model
from ser_ray.training.checkpoint import read_card


def test_a_run_is_a_model_by_its_folder_and_by_its_name(in_tmp, checkpoint):
    run = in_tmp / "ser-ray-out" / "runs" / "mel-fold0"
    selected = run / "selected"
    shutil.copytree(checkpoint, selected)
    for name in (selected, run, "ser-ray-out/runs/mel-fold0", "mel-fold0", f"file://{run}"):
        with local_model(name) as found:
            assert found.resolve() == selected.resolve(), name
    with local_model("no/where") as found, pytest.raises(CheckpointError, match="no checkpoint"):
        read_card(found)
