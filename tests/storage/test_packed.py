"""A recording in a row of a Parquet file has the bytes that pyarrow reads from this row."""

import json
import random
from pathlib import Path
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ser_ray.storage import packed
from ser_ray.storage.packed import packed_location, read_packed

SOUND = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def write(path: Path, recordings: list[bytes | None], row_group_size: int = 3) -> str:
    rows = [{"bytes": data, "path": f"{row}.wav"} for row, data in enumerate(recordings)]
    pq.write_table(pa.table({"audio": pa.array(rows, SOUND)}), path, row_group_size=row_group_size)
    return str(path)


@pytest.fixture
def recordings() -> list[bytes | None]:
    return [f"recording {row}".encode() * (row + 1) for row in range(10)]


@pytest.mark.parametrize("row_group_size", [1, 3, 10, 100])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_row_of_any_row_group_is_what_pyarrow_reads(
    tmp_path: Path, recordings: list[bytes | None], row_group_size: int, scheme: str
) -> None:
    parquet = write(tmp_path / "a#b 1.parquet", recordings, row_group_size)
    uri = Path(parquet).as_uri() if scheme else parquet
    rows = pq.read_table(parquet)["audio"].to_pylist()
    order = random.Random(0).sample(range(10), 10)
    assert [read_packed(packed_location(uri, row)) for row in order] == [
        rows[row]["bytes"] for row in order
    ]


def test_locations_sort_as_the_rows_do() -> None:
    locations = [packed_location("a.parquet", row) for row in (0, 9, 10, 999, 1_000, 10_000_000)]
    assert locations == sorted(locations)


def test_the_recordings_are_found_beside_a_column_of_lists() -> None:
    """Hugging Face describes a column of lists by a list."""
    entries = {"labels": [{"_type": "Value"}], "sound": {"_type": "Audio"}}
    schema = pa.table({"labels": [["a"]], "sound": [{"bytes": b"x"}]}).schema
    text = json.dumps({"info": {"features": entries}})
    assert packed.audio_column(schema.with_metadata({"huggingface": text})) == "sound"


@pytest.mark.parametrize("text", ["[]", '{"info": 1}', '{"info": {"features": [1]}}', "[" * 9999])
def test_damaged_metadata_is_an_error_of_the_file(tmp_path: Path, text: str) -> None:
    table = pa.table({"audio": [{"bytes": b"x"}]}).replace_schema_metadata({"huggingface": text})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(OSError, match=r"a\.parquet"):
        read_packed(packed_location(str(tmp_path / "a.parquet"), 0))


def test_the_footer_is_read_once(
    tmp_path: Path, recordings: list[bytes | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Mock(wraps=pq.read_metadata)
    monkeypatch.setattr(pq, "read_metadata", read)
    parquets = [write(tmp_path / f"{name}.parquet", recordings) for name in "ab"]
    for row in range(10):
        for parquet in parquets:
            read_packed(packed_location(parquet, row))
    assert read.call_count == 2


def test_a_replaced_file_is_read_again(tmp_path: Path, recordings: list[bytes | None]) -> None:
    location = packed_location(write(tmp_path / "a.parquet", recordings), 1)
    assert read_packed(location) == recordings[1]
    write(tmp_path / "a.parquet", [b"other", b"recordings now"])
    assert read_packed(location) == b"recordings now"


@pytest.mark.parametrize("row", ["10", "-1", "x", "", "9" * 30])
def test_a_row_that_is_not_there_is_an_error_of_the_file(
    tmp_path: Path, recordings: list[bytes | None], row: str
) -> None:
    parquet = write(tmp_path / "a.parquet", recordings)
    with pytest.raises(OSError, match=rf"{packed.ROW}{row}: "):
        read_packed(f"{parquet}{packed.ROW}{row}")


def test_a_row_without_a_recording_is_an_error_of_the_file(tmp_path: Path) -> None:
    parquet = write(tmp_path / "a.parquet", [b"sound", None])
    with pytest.raises(OSError, match="the row has no recording"):
        read_packed(packed_location(parquet, 1))
    (tmp_path / "text.parquet").write_text("no Parquet file")
    pq.write_table(pa.table({"sound": [b"x"]}), tmp_path / "other.parquet")
    for name in ("text.parquet", "other.parquet", "missing.parquet"):
        with pytest.raises(OSError, match=name):
            read_packed(packed_location(str(tmp_path / name), 0))


@pytest.mark.slow
def test_a_row_group_may_have_more_than_two_gibibytes(tmp_path: Path) -> None:
    """An array of bytes cannot. Reading needs as much memory."""
    row = {"bytes": bytes(1 << 26), "path": "a.wav"}
    table = pa.table({"audio": pa.chunked_array([pa.array([row], SOUND)] * 33)})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    assert pq.read_metadata(tmp_path / "a.parquet").num_row_groups == 1
    assert read_packed(packed_location(f"{tmp_path}/a.parquet", 32)) == row["bytes"]
