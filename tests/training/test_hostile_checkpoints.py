"""Damaged and hostile checkpoints are used or refused in words. No code in them runs."""

import json
import os
import pickle
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, cast
from zipfile import ZipFile

import pytest
import torch
from hypothesis import strategies as st
from pyarrow import fs
from safetensors.torch import load_file, save_file

from ser_ray.errors import CheckpointError
from ser_ray.shards.read import ShardSet
from ser_ray.storage.paths import filesystem_of
from ser_ray.training.checkpoint import (
    CARD,
    MODEL,
    PROGRESS,
    STATE,
    Snapshot,
    local_checkpoint,
    read_card,
    read_network,
    read_progress,
)
from ser_ray.training.loop import MakeSnapshot, fit
from ser_ray.training.model import Pretrained, read_pretrained
from ser_ray.training.recipe import TrainConfig
from ser_ray.training.trainer import EpochReport
from tests.conftest import PLAIN, make_memory_shards
from tests.hostile import JSON, budgets, damaged, damaged_json, hold, is_answered
from tests.models import SmallNetwork

pytestmark = pytest.mark.usefixtures("small_network")
CONFIG = TrainConfig(
    protocol="speaker-3", epochs=2, batch_size=32, crop_frames=8, weights="none", augment=PLAIN
)
SHARDS = cast(ShardSet, make_memory_shards(per_emotion=1))
FRESH = Pretrained("fresh weights", {})


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint of a training's first epoch."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()

    def write_first(epoch: EpochReport | None, make_snapshot: MakeSnapshot) -> None:
        if epoch and epoch.row["epoch"] == 1:
            make_snapshot().write(folder)

    fit(CONFIG, SHARDS, FRESH, write_first)
    return folder


def use(folder: Path) -> None:
    """Load the model of a checkpoint, and resume its training."""
    card = read_card(folder)
    assert card.trained_on
    read_network(folder, card)
    fit(CONFIG, SHARDS, FRESH, lambda epoch, snapshot: None, resume=folder)


@pytest.mark.parametrize("name", [CARD, PROGRESS])
@budgets(80)
def test_any_json_is_used_or_refused_in_one_line(
    checkpoint: Path, name: str, examples: int
) -> None:
    path = checkpoint / name
    original = json.loads(path.read_text())
    as_bytes = st.builds(lambda value: json.dumps(value).encode(), damaged_json(original) | JSON)

    def is_used_or_refused(content: bytes) -> None:
        path.write_bytes(content)
        read_progress(fs.LocalFileSystem(), str(checkpoint))
        is_answered(lambda: use(checkpoint))

    hold(examples, as_bytes | damaged([path.read_bytes()]), is_used_or_refused)
    path.write_bytes(b"[" * 100_000)
    assert not is_answered(lambda: use(checkpoint))
    changes: list[dict[str, Any]] = [
        {"config": None}, {"config": {"augment": []}}, {"labels": []},
        {"normalisation": {"mean": 10**400, "std": [1.0]}},
    ]  # fmt: skip
    for changed in changes:
        if name == CARD:
            path.write_text(json.dumps(original | changed))
            assert not is_answered(lambda: use(checkpoint))


@pytest.mark.parametrize("name", [MODEL, STATE])
@budgets(40)
def test_any_tensors_are_used_or_refused_in_one_line(
    checkpoint: Path, name: str, examples: int
) -> None:
    path = checkpoint / name
    others = [(checkpoint / other).read_bytes() for other in (MODEL, STATE)]

    def are_used_or_refused(content: bytes) -> None:
        path.write_bytes(content)
        is_answered(lambda: use(checkpoint))

    hold(examples, damaged([path.read_bytes(), *others]), are_used_or_refused)


def test_a_state_of_more_weights_than_the_network_has_is_refused(checkpoint: Path) -> None:
    state = load_file(checkpoint / STATE)
    save_file(state | {"optimiser.99.exp_avg": torch.zeros(1)}, checkpoint / STATE)
    assert not is_answered(lambda: use(checkpoint))


def test_a_weights_file_whose_tensors_have_no_type_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"weight": torch.zeros(1)}, path)
    content = BytesIO()
    with ZipFile(path) as archive, ZipFile(content, "w") as changed:
        for name in archive.namelist():
            # The text `torch` is read in place of the class that names the type.
            text = archive.read(name).replace(b"ctorch\nFloatStorage\n", b"X\5\0\0\0torch")
            changed.writestr(name, text)
    path.write_bytes(content.getvalue())
    assert not is_answered(lambda: read_pretrained(str(path), 4))


class Hostile:
    """An object whose pickle makes a file when it is loaded."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.made),)


@pytest.mark.parametrize("name", [CARD, MODEL, STATE, PROGRESS])
def test_a_pickle_in_a_checkpoint_is_refused_and_not_loaded(checkpoint: Path, name: str) -> None:
    made = checkpoint / "made"
    archive = BytesIO()
    torch.save(Hostile(made), archive)
    for content in (pickle.dumps(Hostile(made), protocol=2), archive.getvalue()):
        (checkpoint / name).write_bytes(content)
        assert not is_answered(lambda: use(checkpoint))
        assert not is_answered(lambda: read_pretrained(str(checkpoint / name), 4))
        assert not made.exists()


@pytest.mark.parametrize("name", [CARD, MODEL, STATE, PROGRESS])
def test_a_link_that_leads_nowhere_is_refused(checkpoint: Path, name: str) -> None:
    path = checkpoint / name
    for target in ("nowhere", name, "."):
        path.unlink()
        path.symlink_to(target)
        assert not is_answered(lambda: use(checkpoint))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@budgets(100)
def test_any_file_of_weights_is_used_or_refused_in_one_line(tmp_path: Path, examples: int) -> None:
    state = SmallNetwork(4).state_dict()
    paths = [tmp_path / "weights.pth", tmp_path / "weights.safetensors"]
    torch.save(state, paths[0])
    torch.save({"state_dict": state}, paths[0])
    save_file(state, paths[1])
    originals = [path.read_bytes() for path in paths]

    def is_used_or_refused(content: bytes) -> None:
        for path in paths:
            path.write_bytes(content)
            is_answered(partial(read_pretrained, str(path), 4))

    hold(examples, damaged(originals), is_used_or_refused)


def test_the_checkpoint_is_used_as_it_is(checkpoint: Path) -> None:
    use(checkpoint)
    assert Snapshot.read(checkpoint).progress["epoch"] == 1


def test_an_error_about_a_checkpoint_in_a_bucket_names_its_location(checkpoint: Path) -> None:
    bucket = "memory://damaged-checkpoints"
    filesystem, folder = filesystem_of(bucket)
    fs.copy_files(str(checkpoint), f"{folder}/run/selected", destination_filesystem=filesystem)
    with filesystem.open_output_stream(f"{folder}/run/selected/{CARD}") as stream:
        stream.write(b"{}")
    schema = f"{CARD}: cannot be read as a checkpoint's card (its schema version is None"
    for name, message in (
        ("nothing", "nothing: no checkpoint here"),
        ("run", f"run/selected/{schema}"),
    ):
        with pytest.raises(CheckpointError) as error, local_checkpoint(f"{bucket}/{name}") as found:
            read_card(found)
        assert str(error.value).startswith(f"{bucket}/{message}")
