"""What names a model: folders and names of runs. `test_packaged.py` has those that MLflow keeps."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from ser_ray.corpus.folds import num_folds
from ser_ray.corpus.splits import split
from ser_ray.errors import CheckpointError
from ser_ray.shards.read import open_shards
from ser_ray.tracking.registry import local_model, read_initial_weights, read_weights
from ser_ray.training.checkpoint import MODEL, read_card
from ser_ray.training.recipe import TrainConfig
from tests.encoders import tiny_card
from tests.models import LABELS, make_checkpoint, make_encoder_checkpoint
from tests.shard_files import write_shard_files


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


def test_a_model_that_was_trained_on_tested_speakers_begins_no_training(tmp_path):
    """Of the same shards, or of RAVDESS; other corpora may have other people of the same name."""
    shards = open_shards(write_shard_files(tmp_path / "a"))  # speakers 01 to 06
    folds = range(num_folds("loso", shards.clips()))
    tests = [split("loso", fold, shards.clips()).test_speakers[0] for fold in folds]
    for corpus, fingerprint, is_refused in (
        ("table", shards.card.fingerprint, True),
        ("table", "another", False),
        ("ravdess", "another", False),  # the shards are of a table
    ):
        make_checkpoint(tmp_path / "model", corpus=corpus, shards_fingerprint=fingerprint)
        for fold in folds:
            config = TrainConfig(weights=str(tmp_path / "model"), protocol="loso", fold=fold)
            if is_refused and tests[fold] in ("01", "02", "03", "04"):
                message = f"validated on the speakers {tests[fold]}, whom fold {fold} of loso tests"
                with pytest.raises(CheckpointError, match=message):
                    read_initial_weights(config, shards, "")
            else:
                assert read_initial_weights(config, shards, "").state
    config = TrainConfig(weights=str(tmp_path / "model"), protocol="loso", fold=tests.index("05"))
    make_checkpoint(tmp_path / "model", shards_fingerprint=shards.card.fingerprint)
    assert read_initial_weights(config, shards, "").state
    with pytest.raises(CheckpointError, match="trained or validated on the speakers 0"):
        read_initial_weights(config, shards, "", folds)


def test_a_head_on_an_encoder_is_no_resnet18(tmp_path):
    make_encoder_checkpoint(tmp_path, tiny_card())
    with pytest.raises(CheckpointError, match=r"a head on the encoder .* do not fit a ResNet18"):
        read_weights(str(tmp_path), LABELS)
