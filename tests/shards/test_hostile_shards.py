"""Damaged cards, clips and outcomes of a shard set are read, or refused with a message."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from ser_ray.corpus.manifest import MANIFEST_SCHEMA
from ser_ray.features.config import FeatureConfig
from ser_ray.shards.card import read_card
from ser_ray.shards.layout import CARD_NAME, CLIPS, OUTCOMES, clips_name, outcomes_name
from ser_ray.shards.plan import (
    FEATURES,
    describe_changes,
    make_plan,
    read_committed,
    restore_times,
    shard_metadata,
)
from ser_ray.shards.read import open_shards
from tests.hostile import JSON, budgets, damaged, damaged_json, hold, is_answered
from tests.shard_files import write_shard_files


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return Path(write_shard_files(tmp_path / "shards"))


def read_all(shards: Path) -> None:
    shard_set = open_shards(str(shards))
    shard_set.clips()
    shard_set.features("mel")


@budgets(300)
def test_any_card_is_read_or_refused_in_one_line(shards: Path, examples: int) -> None:
    card = shards / CARD_NAME
    original = json.loads(card.read_text())
    as_bytes = st.builds(lambda value: json.dumps(value).encode(), damaged_json(original))

    def is_read_or_refused(content: bytes) -> None:
        card.write_bytes(content)
        is_answered(lambda: read_all(shards))

    hold(examples, as_bytes | damaged([card.read_bytes()]), is_read_or_refused)
    card.write_bytes(b"[" * 100_000)
    assert not is_answered(lambda: read_all(shards))


@budgets(100)
def test_any_clips_are_read_or_refused_in_one_line(shards: Path, examples: int) -> None:
    file = shards / clips_name(0)
    original = file.read_bytes()

    def are_read_or_refused(content: bytes) -> None:
        file.write_bytes(content)
        is_answered(lambda: read_all(shards))

    hold(examples, damaged([original]), are_read_or_refused)


@budgets(200)
def test_a_plan_is_made_whatever_the_committed_outcomes_are(shards: Path, examples: int) -> None:
    features = FeatureConfig()
    rows = [{"path": name, "size": 1, "modified": 2, "take": name} for name in ("a", "b")]
    manifest = pa.Table.from_pylist(rows, MANIFEST_SCHEMA)
    committed = manifest.append_column("digest", pa.array(["0", "1"]))
    metadata = shard_metadata("f00d", features)
    (shards / OUTCOMES).mkdir()

    def written(table: pa.Table, metadata: dict[bytes, bytes]) -> bytes:
        buffer = BytesIO()
        pq.write_table(table.replace_schema_metadata(metadata), buffer)
        return buffer.getvalue()

    def with_features(value: Any) -> bytes:
        return written(committed, metadata | {FEATURES: json.dumps(value).encode()})

    whole = written(committed, metadata)
    contents = st.one_of(
        damaged([whole]),
        st.builds(with_features, damaged_json(json.loads(metadata[FEATURES])) | JSON),
        st.builds(lambda key: written(committed, metadata | {b"ser_ray.shard_key": key}),
                  st.binary(max_size=9)),
        st.builds(lambda value: written(committed, metadata | {FEATURES: value}),
                  st.binary(max_size=9)),
        st.builds(lambda name: written(committed.drop_columns([name]), metadata),
                  st.sampled_from(committed.column_names)),
        st.builds(
            lambda name: written(
                committed.set_column(committed.column_names.index(name), name, pa.nulls(2)),
                metadata,
            ),
            st.sampled_from(committed.column_names),
        ),
    )  # fmt: skip

    def is_planned(content: bytes) -> None:
        (shards / outcomes_name(0)).write_bytes(content)
        found = read_committed(str(shards))
        plan = make_plan(restore_times(manifest, found), features, 128, found)
        describe_changes(found, features, plan)
        assert plan.num_files == 2

    hold(examples, contents, is_planned)


def test_a_card_that_is_no_file_is_refused(shards: Path) -> None:
    card = shards / CARD_NAME
    card.unlink()
    card.symlink_to(card.name)
    assert not is_answered(lambda: read_card(str(shards)))
    card.unlink()
    card.mkdir()
    assert not is_answered(lambda: read_card(str(shards)))
    assert (shards / CLIPS).is_dir()
