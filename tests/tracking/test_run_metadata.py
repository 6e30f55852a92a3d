"""What MLflow shows of a run besides its numbers."""

import json
from typing import cast

import pytest

from ser_ray.shards.read import ShardSet
from ser_ray.tracking.run_metadata import dataset_of, merge_note, model_name, run_tags
from tests.conftest import MemoryShards


def test_lines_of_a_description_are_kept_replaced_and_ordered() -> None:
    note = merge_note("", {"Data": "ravdess, **24** speakers", "Run": "one training"})
    note = merge_note(note, {"Test": "UA 50.0%: low", "Run": "a search"})
    assert note.split("\n\n") == [
        "**Test**: UA 50.0%: low",
        "**Run**: a search",
        "**Data**: ravdess, **24** speakers",
    ]
    assert "Test" not in merge_note(note, {"Test": ""})


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


def test_tags_say_what_a_run_is(memory_shards: MemoryShards) -> None:
    tags = run_tags("fold", "loso fold 1", cast(ShardSet, memory_shards))
    shown = {name for name in tags if not name.startswith("mlflow.")}
    assert shown == {"kind", "protocol", "corpus", "shards.fingerprint", "command"}
    assert (tags["kind"], tags["protocol"]) == ("fold", "loso fold 1")


@pytest.mark.parametrize(
    ("run", "model"), [("fold 1 seed 0", "fold 1 seed 0"), ("a/b:c.d%e'f", "a-b-c-d-e-f")]
)
def test_a_model_has_the_name_of_its_run_as_far_as_mlflow_allows(run: str, model: str) -> None:
    assert model_name(run) == model
