"""What names a model: folders and names of runs. `test_packaged.py` has those that MLflow keeps."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from ser_ray.corpus.folds import num_folds
from ser_ray.corpus.splits import split
from ser_ray.corpus.words import CorpusKind
from ser_ray.errors import CheckpointError
from ser_ray.shards.card import UsedCorpus
from ser_ray.shards.corpora import open_corpora
from ser_ray.shards.read import open_shards
from ser_ray.tracking.registry import local_model, read_initial_weights, read_weights
from ser_ray.training.checkpoint import MODEL, read_card
from ser_ray.training.recipe import TrainConfig
from tests.encoders import tiny_card
from tests.models import LABELS, make_checkpoint, make_encoder_checkpoint
from tests.shard_files import write_shard_files, write_spelled


def test_a_run_is_a_model_by_its_folder_and_by_its_name(in_tmp, checkpoint):
    run = in_tmp / "ser-ray-out" / "runs" / "mel-fold0"
    selected = run / "selected"
    shutil.copytree(checkpoint, selected)
    for name in (selected, run, "ser-ray-out/runs/mel-fold0", "mel-fold0", f"file://{run}"):
        with local_model(name) as found:
            assert found.resolve() == selected.resolve(), name
    with local_model("no/where") as found, pytest.raises(CheckpointError, match="no checkpoint"):
        read_card(found)


def test_an_error_of_the_caller_is_no_error_of_the_storage(checkpoint):
    error = OSError("the caller's disk is full")
    with pytest.raises(OSError, match="disk is full") as raised, local_model(checkpoint):
        raise error
    assert raised.value is error


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


def used(name: str, kind: CorpusKind = "table") -> UsedCorpus:
    """A corpus of a model that was trained on several, or on one with mapped labels."""
    return UsedCorpus(
        name=name, kind=kind, fingerprint=f"{name:f>16}", labels={}, clips=1, speakers=1,
        left_out={},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("corpora", "trained", "sets", "tested", "is_refused"),
    [
        ((), "01", "ab", "a:01", True),  # one set, and then several
        ((), "02", "ab", "a:01", False),
        ((), "01", "ab", "b:01", False),  # another person of the same name
        ((used("a"),), "01", "ab", "a:01", True),  # one set with mapped labels
        ((used("a"), used("c")), "a:01", "a", "01", True),  # several sets, and then one
        ((used("a"), used("c")), "c:01", "a", "01", False),
        ((used("a"), used("b")), "a:01", "ab", "a:01", True),
        ((used("a"), used("b")), "b:01", "ab", "a:01", False),
    ],
)
def test_speakers_of_one_set_are_known_in_several_and_the_reverse(
    corpora, trained, sets, tested, is_refused, tmp_path
):
    """The same person may have a name with the prefix of the corpus, and one without."""
    shards = open_corpora([write_spelled(tmp_path / name) for name in sets])
    make_checkpoint(
        tmp_path / "model",
        corpora=corpora,
        shards_fingerprint=used("several" if len(corpora) > 1 else "a").fingerprint,
        split={"train_speakers": [trained], "validation_speakers": []},
    )
    folds = range(num_folds("loso", shards.clips()))
    tests = [split("loso", fold, shards.clips()).test_speakers[0] for fold in folds]
    fold = tests.index(tested)
    config = TrainConfig(weights=str(tmp_path / "model"), protocol="loso", fold=fold)
    if is_refused:
        message = f"validated on the speakers {tested}, whom fold {fold} of loso tests"
        with pytest.raises(CheckpointError, match=message):
            read_initial_weights(config, shards, "")
    else:
        assert read_initial_weights(config, shards, "").state


def test_all_of_ravdess_is_one_corpus_and_a_folder_has_any_name(tmp_path):
    """A set of RAVDESS may be prepared again, and a folder renamed: people remain the same."""
    ours = [
        write_spelled(tmp_path / "a", corpus="ravdess"),
        write_spelled(tmp_path / "renamed", fingerprint=used("b").fingerprint),
    ]
    shards = open_corpora(ours)
    folds = range(num_folds("loso", shards.clips()))
    tests = [split("loso", fold, shards.clips()).test_speakers[0] for fold in folds]
    for changes, trained, tested in (
        ({"corpus": "ravdess"}, "01", "ravdess:01"),
        ({"corpora": (used("d", "ravdess"), used("e"))}, "ravdess:02", "ravdess:02"),
        ({"corpora": (used("b"), used("e"))}, "b:03", "renamed:03"),
    ):
        known = {"train_speakers": [], "validation_speakers": [trained]}
        make_checkpoint(tmp_path / "model", shards_fingerprint="other", split=known, **changes)
        config = TrainConfig(weights=str(tmp_path / "model"), protocol="loso")
        with pytest.raises(CheckpointError, match=f"on the speakers {tested}, whom"):
            read_initial_weights(config, shards, "", folds)
        others = [fold for fold in folds if tests[fold] != tested]
        assert read_initial_weights(config, shards, "", others).state


def test_a_head_on_an_encoder_is_no_resnet18(tmp_path):
    make_encoder_checkpoint(tmp_path, tiny_card())
    with pytest.raises(CheckpointError, match=r"a head on the encoder .* do not fit a ResNet18"):
        read_weights(str(tmp_path), LABELS)
