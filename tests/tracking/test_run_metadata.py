"""What MLflow shows of a run besides its numbers."""

import json
import sys
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from ser_ray.shards.corpora import open_corpora
from ser_ray.shards.read import ShardSet, open_shards
from ser_ray.tracking.run_metadata import data_line, dataset_of, merge_note, model_name, run_tags
from tests.conftest import MemoryShards, cut_into_windows, make_memory_shards
from tests.shard_files import write_shard_files


def test_lines_of_a_description_are_kept_replaced_and_ordered() -> None:
    note = merge_note("", {"Data": "ravdess, **24** speakers", "Run": "one training"})
    note = merge_note(note, {"Test": "UA 50.0%: low", "Run": "a search"})
    assert note.split("\n\n") == [
        "**Test**: UA 50.0%: low",
        "**Run**: a search",
        "**Data**: ravdess, **24** speakers",
    ]
    assert "Test" not in merge_note(note, {"Test": ""})


def test_text_of_the_user_in_a_description_stays() -> None:
    lines = {"Run": "one training", "Test": "UA 50.0%"}
    own = "Compare with **Monday**.\n\n- a list\n- of two\n\n**Todo**: listen again"
    note = f"Why: **Run** differs.\n\n{merge_note('', lines)}\n\n{own}"
    ours = ["**Test**: UA 50.0%", "**Run**: one training", "Why: **Run** differs."]
    assert merge_note(note, {}) == "\n\n".join([*ours, own])
    changed = merge_note(note, {"Run": "a search"})
    assert changed == merge_note(note, {}).replace("one training", "a search")
    assert merge_note(changed, {"Run": "a search"}) == changed
    assert merge_note(note, {"Test": "", "Run": ""}) == f"{ours[2]}\n\n{own}"
    assert merge_note("mine", {}) == "mine"
    assert merge_note("mine", {"Run": "a search"}) == "**Run**: a search\n\nmine"


def test_the_data_set_of_a_run_is_the_shard_set(memory_shards: MemoryShards) -> None:
    dataset = dataset_of(cast(ShardSet, memory_shards)).dataset
    assert (dataset.name, dataset.digest) == ("own", "f00d")
    assert json.loads(dataset.source) == {"uri": "memory"}
    schema = json.loads(str(dataset.schema))["mlflow_colspec"]
    columns = {item["name"]: item["type"] for item in schema}
    assert columns["speaker"] == "string"
    assert columns["num_frames"] == "long"
    assert columns["mel"] == "binary"
    assert json.loads(str(dataset.profile))["labels"] == list(memory_shards.card.labels)


def test_a_clip_that_is_cut_into_windows_counts_once(tmp_path: Path) -> None:
    memory = make_memory_shards()
    times = np.ones(len(memory.table), int)
    times[:5] = 3
    folders = [write_shard_files(tmp_path / "a", cut_into_windows(memory, times))]
    folders += [write_shard_files(tmp_path / "b", memory)]
    for shards, num_clips in ((open_shards(folders[0]), 48), (open_corpora(folders), 96)):
        assert shards.card.num_rows == num_clips + 10
        assert f", {num_clips} clips, 4 labels, in " in data_line(shards)
        profile = json.loads(str(dataset_of(shards).dataset.profile))
        assert profile["num_clips"] == num_clips


def test_tags_say_what_a_run_is(
    memory_shards: MemoryShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/ser-ray", "train"])  # of a process of xdist: ["-c"]
    tags = run_tags("fold", "loso fold 1", cast(ShardSet, memory_shards))
    shown = {name for name in tags if not name.startswith("mlflow.")}
    assert shown == {"kind", "protocol", "corpus", "shards.fingerprint", "command"}
    assert (tags["kind"], tags["protocol"]) == ("fold", "loso fold 1")
    assert tags["command"] == "ser-ray train"


@pytest.mark.parametrize(
    ("run", "model"), [("fold 1 seed 0", "fold 1 seed 0"), ("a/b:c.d%e'f", "a-b-c-d-e-f")]
)
def test_a_model_has_the_name_of_its_run_as_far_as_mlflow_allows(run: str, model: str) -> None:
    assert model_name(run) == model
