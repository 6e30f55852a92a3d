"""What names a model: folders and names of runs. `test_packaged.py` has those that MLflow keeps."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from ser_ray.errors import CheckpointError
from ser_ray.tracking.registry import local_model, read_weights
from ser_ray.training.checkpoint import MODEL, read_card
from tests.models import LABELS


def test_a_run_is_a_model_by_its_folder_and_by_its_name(in_tmp, checkpoint):
    run = in_tmp / "ser-ray-out" / "runs" / "mel-fold0"
    selected = run / "selected"
    shutil.copytree(checkpoint, selected)
    for name in (selected, run, "ser-ray-out/runs/mel-fold0", "mel-fold0", f"file://{run}"):
        with local_model(name) as found:
            assert found.resolve() == selected.resolve(), name
    with local_model("no/where") as found, pytest.raises(CheckpointError, match="no checkpoint"):
        read_card(found)


def test_a_model_begins_a_training_and_keeps_its_last_layer_only_for_its_own_labels(checkpoint):
    weights = load_file(checkpoint / MODEL)
    same = read_weights(str(checkpoint), LABELS)
    assert same.state.keys() == weights.keys()
    assert all(torch.equal(same.state[name], weights[name]) for name in weights)
    assert same.origin == f"the model {checkpoint}, trained on mel of a custom corpus"
    other = read_weights(str(checkpoint), ("bored", *LABELS[1:]))
    assert weights.keys() - other.state.keys() == {"fc.weight", "fc.bias"}
    assert other.origin == f"{same.origin}; fresh: fc, because its labels are {', '.join(LABELS)}"
    with pytest.raises(CheckpointError, match=r"gone.pth: no such file; --weights takes"):
        read_weights("gone.pth", LABELS)
    with pytest.raises(CheckpointError, match=r"no/where: no checkpoint here"):
        read_weights("no/where", LABELS)
