"""Every table with one meaning is read; any other table is refused, and the row is named."""

import json
import unicodedata
from decimal import Decimal
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from ser_ray.corpus.manifest import list_corpus
from ser_ray.corpus.tables.clips import NO_FOLDER, OTHER_DRIVE
from ser_ray.errors import CorpusError
from ser_ray.storage.listing import NO_FILE
from ser_ray.storage.paths import NULL_CHARACTER
from tests.hostile import budgets, damaged, damaged_json, hold, is_answered

NAMES = ("clips/ä 1.wav", "clips/b.wav")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "clips").mkdir()
    for name in NAMES:
        (tmp_path / name).touch()
    return tmp_path


def rows_of(table: Path) -> list[tuple[str, str, str, str | None]]:
    rows = list_corpus(str(table)).manifest.to_pylist()
    inside = [Path(row["path"]).relative_to(table.parent).as_posix() for row in rows]
    return [
        (name, row["emotion"], row["speaker"], row["reason"])
        for name, row in zip(inside, rows, strict=True)
    ]


EXPECTED = [("clips/b.wav", "zorn", "01", None), ("clips/ä 1.wav", "fröhlich", "02", None)]
PLAIN = "path,label,speaker\nclips/ä 1.wav,fröhlich,02\nclips/b.wav,zorn,01\n"
DIALECTS = {
    "plain": PLAIN.encode(),
    "semicolon": PLAIN.replace(",", ";").encode(),
    "tab": PLAIN.replace(",", "\t").encode(),
    "excel": b"sep=;\r\n" + PLAIN.replace(",", ";").replace("\n", "\r\n").encode("cp1252"),
    "utf-8 with a mark": PLAIN.encode("utf-8-sig"),
    "utf-16": PLAIN.replace(",", "\t").encode("utf-16"),
    "utf-16 without a mark": PLAIN.encode("utf-16-le"),
    "windows-1252": PLAIN.encode("cp1252"),
    "old line ends": PLAIN.replace("\n", "\r").encode(),
    "header": PLAIN.replace("path,label,speaker", " Path , LABEL,Speaker ").encode(),
    "quoted header": PLAIN.replace("path,label,speaker", '"path","label","speaker"').encode(),
    "blanks": PLAIN.replace(",", " , ").encode(),
    "backslashes": PLAIN.replace("clips/", "clips\\").encode(),
    "both slashes": PLAIN.replace("clips/", ".\\./clips\\").encode(),
    "other normal form": unicodedata.normalize("NFD", PLAIN).encode(),
    "utf-32": PLAIN.encode("utf-32"),
    "quoted line of excel": b'"SEP=;"\n' + PLAIN.replace(",", ";").encode(),
    "another separator": b"sep=^\r" + PLAIN.replace(",", "^").replace("\n", "\r").encode(),
    "blank rows": b" \n" + PLAIN.encode() + b"  \n,,\n , ,\n",
    "uris": PLAIN.replace("clips/b", "FILE://localhost{folder}/clips/b").encode(),
    "words": PLAIN.replace("path,label,speaker", "File Name,Label,speaker-ID").encode(),
    "index": b",path,label,speaker\n"
    + "\n".join(f"{i},{row}" for i, row in enumerate(PLAIN.splitlines()[1:])).encode(),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_names_the_same_clips(folder: Path, dialect: str) -> None:
    content = DIALECTS[dialect].replace(b"{folder}", str(folder).encode())
    (folder / "t.csv").write_bytes(content)
    assert rows_of(folder / "t.csv") == EXPECTED
    notes = list_corpus(str(folder / "t.csv")).notes
    assert bool(notes) == (dialect in ("excel", "windows-1252"))


def test_a_choice_between_two_columns_is_said(folder: Path) -> None:
    rows = [f"{row},strong" for row in PLAIN.splitlines()[1:]]
    (folder / "t.csv").write_text("\n".join(["path,Label,speaker,emotion", *rows]))
    (note,) = list_corpus(str(folder / "t.csv")).notes
    assert note.endswith("the label is read from the column Label, and not from emotion; --columns "
                         "label=emotion reads the other column")  # fmt: skip
    chosen = list_corpus(str(folder / "t.csv"), columns={"label": "emotion"})
    assert (chosen.labels, chosen.notes) == (("strong",), ())


def test_names_with_line_ends_and_signs_are_read(tmp_path: Path) -> None:
    names = ["new\nline.wav", 'say "hi".wav', "100 %20 #1.wav", "a;b,c.wav"]
    for name in names:
        (tmp_path / name).touch()
    quoted = ['"' + name.replace('"', '""') + '",x,1' for name in names]
    (tmp_path / "t.csv").write_text("\n".join(["path,label,speaker", *quoted]))
    assert [row[0] for row in rows_of(tmp_path / "t.csv")] == sorted(names)
    assert {row[3] for row in rows_of(tmp_path / "t.csv")} == {None}


@pytest.mark.parametrize("texts", [('"Hello there', '"Hello there'), ('"Hello there', "Hello")])
def test_a_quotation_mark_that_would_join_rows_is_refused(
    folder: Path, texts: tuple[str, str]
) -> None:
    header, *rows = PLAIN.replace(",", "\t").splitlines()
    lines = [f"{row}\t{text}" for row, text in zip(rows, texts, strict=True)]
    (folder / "t.tsv").write_text("\n".join([f"{header}\ttext", *lines]))
    with pytest.raises(CorpusError, match="quotation mark that opens a value near line 2 is not"):
        list_corpus(str(folder / "t.tsv"))


def test_quotation_marks_of_a_value_join_no_rows(folder: Path) -> None:
    header, *rows = PLAIN.splitlines()
    texts = ('"a ""q""\nin two lines"', '5" mic' + 200_000 * "!")
    lines = [f"{row},{text}" for row, text in zip(rows, texts, strict=True)]
    (folder / "t.csv").write_text("\n".join([f"{header},text", *lines]))
    assert rows_of(folder / "t.csv") == EXPECTED


@pytest.mark.parametrize("word", ["NaN", "nan", "N/A", "NULL", "<NA>", "None", " "])
def test_words_for_missing_values_are_refused_with_their_row(folder: Path, word: str) -> None:
    text = f"path,label,speaker\nclips/b.wav,zorn,{word}\nclips/ä 1.wav,{word},01\n"
    (folder / "t.csv").write_text(text)
    with pytest.raises(CorpusError, match=r"row 1 .* has no speaker.*, row 2 has no label"):
        list_corpus(str(folder / "t.csv"))
    if word.strip():
        assert list_corpus(str(folder / "t.csv"), missing=()).labels == tuple(
            sorted([word, "zorn"])
        )
        with pytest.raises(CorpusError, match="has no label \\('zorn'\\)"):
            list_corpus(str(folder / "t.csv"), missing=["ZORN"])


@pytest.mark.parametrize("value", [float("nan"), None])
def test_nan_and_null_are_missing_values(folder: Path, value: float | None) -> None:
    columns = {"path": list(NAMES), "label": [1.0, value], "speaker": ["1", "2"]}
    pq.write_table(pa.table(columns), folder / "t.parquet")
    for words in (["nan"], []):
        with pytest.raises(CorpusError, match=r"row 2 \(after the header\) has no label"):
            list_corpus(str(folder / "t.parquet"), missing=words)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("t.csv", b"<html><body>Log in</body></html>", "no column label, path, speaker"),
        ("t.csv", b"# my clips\npath,label,speaker\na,b,c\n", "but it has # my clips[.]"),
        ("t.csv", bytes(500), r"but it has (\\x00)+"),
        ("t.csv", b"path,label,speaker\n\xff\x81.wav,x,1\n", "it is not text in UTF-8, UTF-16"),
        ("t.jsonl", b'{"path": "a.wav"\n', "line 1 is not a JSON object"),
        ("t.jsonl", b"[" * 100_000, "line 1 is not a JSON object"),
        ("t.jsonl", b"\xff\xfe", "it is not text in UTF-8"),
        ("t.jsonl.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\xff\xff\xff", "it is no complete gzip file"),
        ("t.parquet", b"PAR1" + bytes(99) + b"PAR1", "its content is damaged"),
        ("t.parquet", b"", "its content is damaged"),
    ],
)
def test_why_a_table_cannot_be_read_is_said_in_our_words(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=reason):
        list_corpus(str(tmp_path / name))


def test_a_column_of_lists_is_named(tmp_path: Path) -> None:
    rows = pa.table({"path": ["a.wav"], "label": [["sad"]], "speaker": ["1"]})
    pq.write_table(rows, tmp_path / "t.parquet")
    with pytest.raises(CorpusError, match="the column label has values that are not texts or num"):
        list_corpus(str(tmp_path / "t.parquet"))


def test_a_length_beside_a_start_is_a_segment_and_alone_it_is_not(tmp_path: Path) -> None:
    source = tmp_path / "t.csv"
    source.write_text("path,label,speaker,duration\na.wav,sad,1,2.5\n")
    assert list_corpus(str(source)).manifest["end"].to_pylist() == [None]
    source.write_text("path,label,speaker,start,duration\na.wav,sad,1,1,2.5\n")
    with pytest.raises(CorpusError, match="has the column duration, so its rows seem to be segm"):
        list_corpus(str(source))


def test_a_label_in_two_normal_forms_is_one(tmp_path: Path) -> None:
    source = tmp_path / "t.csv"
    source.write_text("path,label,speaker\na.wav,fro\u0308hlich,1\nb.wav,fr\u00f6hlich,1\n")
    assert list_corpus(str(source)).labels == ("fr\u00f6hlich",)


def test_missing_files_get_the_right_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    paths = ["~/clips/b.wav", "clips/gone.wav", "other/b.wav", "C:\\clips\\b.wav", "D:/c.wav"]
    rows = "".join(f"{path},x,1\n" for path in paths)
    (folder / "t.csv").write_text("path,label,speaker\n" + rows)
    found = list_corpus(str(folder / "t.csv")).manifest.to_pylist()
    assert {row["path"].rpartition("/")[2]: row["reason"] for row in found if row["reason"]} == {
        "gone.wav": NO_FILE,
        "b.wav": NO_FOLDER,
        "C:\\clips\\b.wav": OTHER_DRIVE,
        "c.wav": OTHER_DRIVE,
    }
    assert str(folder / "clips/b.wav") in {row["path"] for row in found if not row["reason"]}


TIMES = {
    "seconds": ("0.5", "1e0", "", "2.25"),
    "pandas": ("0 days 00:00:00.500000", "0 days 00:00:01", "NaT", "0 days 00:00:02.25"),
    "clock": ("00:00:00.5", "0:0:1", "nan", "00:00:02.25"),
    "decimal commas": ("0,5", "1,000", "-", "2,25"),
    "commas in clock times": ("00:00:00,500", "00:00:01,000", "", "00:00:02,250"),
    "units": ("500ms", "1 s", "", "2.25 sec"),
}


@pytest.mark.parametrize("dialect", [*TIMES, "durations"])
def test_two_times_are_a_segment_of_a_file(folder: Path, dialect: str) -> None:
    """A row from 0 to the end is the complete file; equal rows are duplicates."""
    one, two, none, three = TIMES.get(dialect, TIMES["pandas"])
    names = ["b.wav", "b.wav", "b.wav", "b.wav", "ä 1.wav", "b.wav"]
    starts, ends = [two, one, one, none, "0", two], [none, two, two, three, none, three]
    if dialect == "durations":
        columns = {"file": [f"clips/{name}" for name in names], "emotion": ["x"] * 6}
        times = {"start": pandas.to_timedelta(starts), "end": pandas.to_timedelta(ends)}
        source = folder / "t.parquet"
        pandas.DataFrame(columns | times | {"speaker": ["1"] * 6}).to_parquet(source)
    else:
        source = folder / "t.csv"
        rows = [f"clips/{n};{s};{e};1;x" for n, s, e in zip(names, starts, ends, strict=True)]
        source.write_text("\n".join(["file;start;end;speaker;emotion", *rows]))
    found = list_corpus(str(source)).manifest.to_pylist()
    assert [(row["start"], row["end"], row["status"]) for row in found] == [
        (0.0, 2.25, None),
        (0.5, 1.0, None),
        (0.5, 1.0, "duplicate"),
        (1.0, 2.25, None),
        (1.0, None, None),
        (None, None, None),
    ]
    assert [Path(row["path"]).name for row in found] == ["b.wav"] * 5 + ["ä 1.wav"]
    assert len({row["take"] for row in found}) == 5


CELLS = st.one_of(
    st.sampled_from(["path", "label", "speaker", "take", "start", "nan", "\0", '"', "~x", "~"]),
    st.sampled_from(["a.wav", "C:\\x", "\\\\x", "../" * 99, "x" * 300, "x" * 200_000, "a\nb"]),
    st.sampled_from(["s3://a:b@c/d", "s3://b/c.wav", "file://\0", "http://[", "memory://x", "::"]),
    st.sampled_from(["://", "[", "file://" + "x" * 300, "file:///tmp/%00", "s3://", "x://y:z"]),
    st.sampled_from(["1", "-1", "1e400", "inf", "1:2:3", "9" * 400, "1e-320", "0 days", "NaT"]),
    st.text(max_size=10),
)


@st.composite
def texts(draw: st.DrawFn) -> bytes:
    """A table of text with any values, lengths of rows, quotes, separators and encodings."""
    header = draw(st.permutations(["path", "label", "speaker"]))
    header += draw(st.sampled_from([[], ["start", "end"], ["take"], ["end"]]))
    rows = draw(st.lists(st.lists(CELLS, min_size=len(header), max_size=len(header)), max_size=5))
    if draw(st.booleans()):
        rows = [[*row, draw(CELLS)] if draw(st.booleans()) else row for row in rows]
    separator = draw(st.sampled_from([",", ";", "\t", "|"]))
    end = draw(st.sampled_from(["\n", "\r\n", "\r", "\n\n"]))
    text = end.join(separator.join(row) for row in [header, *rows])
    encoding = draw(st.sampled_from(["utf-8", "utf-16", "utf-32", "cp1252", "utf-7", "latin-1"]))
    return text.encode(encoding, draw(st.sampled_from(["replace", "ignore"])))


VALUES = st.sampled_from(
    [
        pa.array([1, 2]), pa.array([0.5, float("nan")]), pa.array([None, None]),
        pa.array([b"a", b"\xff"]), pa.array(["a.wav", "b.wav"]), pa.array([["a"], ["b"]]),
        pa.array([{"a": 1}, {"a": 2}]), pa.array(["a", "b"]).dictionary_encode(),
        pa.array([1, 2], pa.timestamp("ns", "UTC")), pa.array([1, 2], pa.duration("s")),
        pa.array([Decimal("1.5"), Decimal("2.5")]), pa.array([True, False]),
        pa.array(["a", "b"], pa.large_string()), pa.array(["a", "b"], pa.string_view()),
        pa.array([[("a", 1)]] * 2, pa.map_("string", "int8")), pa.array([1, 2], pa.date32()),
        pa.array([b"ab", b"cd"], pa.binary(2)), pa.array([b"a", b"b"], pa.large_binary()),
        pa.array([1, 2], pa.uint64()), pa.array(np.array([1, 2], np.float16)),
        pa.array([1, 2], pa.time64("ns")),
    ]
)  # fmt: skip


@st.composite
def parquets(draw: st.DrawFn) -> bytes:
    """A Parquet file with columns of any types, perhaps twice."""
    names = ["path", "label", "speaker"]
    names += draw(st.lists(st.sampled_from(["take", "Path", " label", "end", "start"]), max_size=2))
    buffer = BytesIO()
    pq.write_table(pa.table([draw(VALUES) for _ in names], names=names), buffer)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@budgets(500)
def test_any_table_is_listed_or_refused_in_one_line(folder: Path, examples: int) -> None:
    whole = BytesIO()
    rows = {"path": ["clips/b.wav"] * 2, "label": ["a", "b"], "speaker": ["1", "2"]}
    pq.write_table(pa.table(rows), whole)
    any_parquet = parquets() | damaged([whole.getvalue()])
    lines = [{"path": "clips/b.wav", "label": "a", "speaker": "1"}] * 2
    any_lines = st.builds(
        lambda rows: "\n".join(map(json.dumps, rows)).encode(), st.lists(damaged_json(lines[0]))
    )
    whole_lines = "\n".join(map(json.dumps, lines)).encode()
    tables = st.one_of(
        st.tuples(st.just("t.csv"), st.binary(max_size=200)),
        st.tuples(st.just("t.jsonl"), any_lines | damaged([whole_lines])),
        st.tuples(st.just("t.csv"), texts() | damaged(list(DIALECTS.values()))),
        st.tuples(st.just("t.parquet"), any_parquet),
    )

    def is_listed_or_refused(table: tuple[str, bytes]) -> None:
        name, data = table
        (folder / name).write_bytes(data)
        is_answered(lambda: list_corpus(str(folder / name)))

    hold(examples, tables, is_listed_or_refused)


@pytest.mark.parametrize("time", ["1,500", "1 000", "0.0:01", "1,2,3", "5 0", "1.000,5"])
def test_a_time_with_two_meanings_is_refused(folder: Path, time: str) -> None:
    """pandas would read these as nanoseconds, or without the comma."""
    (folder / "t.csv").write_text(f"path;label;speaker;start\nclips/b.wav;x;1;{time}\n")
    with pytest.raises(CorpusError, match=f"row 1 .after the header. has the start {time}"):
        list_corpus(str(folder / "t.csv"))


@pytest.mark.parametrize(
    "name", ["Start (s)", "start [ms]", "startTime", "segment_start", "start.time", "xmin", "tmax"]
)
def test_a_column_of_times_is_not_ignored(folder: Path, name: str) -> None:
    (folder / "t.csv").write_text(f"path,label,speaker,{name}\nclips/b.wav,x,1,0.5\n")
    with pytest.raises(CorpusError, match="so its rows seem to be segments"):
        list_corpus(str(folder / "t.csv"))


@pytest.mark.parametrize("name", ["send", "weekend", "started_by", "gender", "trend", "endpoint"])
def test_other_columns_are_ignored(folder: Path, name: str) -> None:
    (folder / "t.csv").write_text(f"path,label,speaker,{name}\nclips/b.wav,x,1,0.5\n")
    assert rows_of(folder / "t.csv") == [("clips/b.wav", "x", "1", None)]


def test_folders_and_files_in_different_normal_forms_are_found(tmp_path: Path) -> None:
    path = Path(tmp_path, unicodedata.normalize("NFD", "é"), unicodedata.normalize("NFC", "ü.wav"))
    path.parent.mkdir()
    path.touch()
    (tmp_path / "t.csv").write_text("path,label,speaker\né/ü.wav,x,1\n")
    [row] = list_corpus(str(tmp_path / "t.csv")).manifest.to_pylist()
    assert (row["path"], row["status"]) == (str(path), None)


def test_a_table_without_separators_or_rows_gets_the_right_advice(folder: Path) -> None:
    (folder / "t.csv").write_text("path:label:speaker\nclips/b.wav:x:1\n")
    with pytest.raises(CorpusError, match="Separate the values by commas"):
        list_corpus(str(folder / "t.csv"))
    (folder / "t.jsonl").write_text("")
    with pytest.raises(CorpusError, match="the table is empty"):
        list_corpus(str(folder / "t.jsonl"))


def test_a_null_character_is_not_an_encoding(folder: Path) -> None:
    (folder / "t.csv").write_text(f"{PLAIN}clips/\0.wav,x,1\n")
    reasons = [reason for *_, reason in rows_of(folder / "t.csv")]
    assert sorted(map(str, reasons)) == ["None", "None", NULL_CHARACTER]


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (("Training", "DEV"), ("train", "validation")),
        (("Training", "fold 1"), ("train", "fold 1")),
        (("3", "N/A"), ("3", None)),
        (("test", "tset"), ("test", "tset")),  # --protocol table refuses this, with the reason
    ],
)
def test_the_parts_of_a_split_have_several_names_and_other_values_are_folds(
    folder: Path, given: tuple[str, str], read: tuple[str, str | None]
) -> None:
    header, *rows = PLAIN.splitlines()
    lines = [f"{header},split", *(f"{row},{part}" for row, part in zip(rows, given, strict=True))]
    (folder / "t.csv").write_text("\n".join(lines))
    found = list_corpus(str(folder / "t.csv")).manifest.sort_by([("path", "descending")])
    assert tuple(found["split"].to_pylist()) == read
