"""Reads a folder of another tool as one table: EmoBox, Kaldi, lhotse or audformat.

The columns keep the tool's names, with two exceptions. The recordings of lhotse become the column
`path`. The files `wav.scp`, `utt2spk`, `utt2emo` and `segments` of Kaldi become the columns `path`,
`speaker`, `label`, `start` and `end`. No recording is decoded, and no command is run.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa

from ser_ray.corpus.tables.files import FindColumns, Row, TableError, as_table, read_json_lines
from ser_ray.corpus.words import part_of_file
from ser_ray.errors import CorpusError, first_line
from ser_ray.storage.paths import location_inside, read_file

FOLD = re.compile(r".*_(train|valid|test)_fold_?(\d+)\.jsonl")
_LABEL_FILES = ("utt2emo", "utt2emotion", "utt2label", "text")
"""The files of a Kaldi folder that may hold the labels; the first one that exists is read."""
_COMMAND = (
    " is the output of a command, and commands are not run; write the recordings into files first"
)


def read_folds(tables: Mapping[str, str]) -> pa.Table:
    """Read the folds of EmoBox as a table with one row for each clip.

    The column `fold` has the number of the fold that tests the clip, or `train` if no fold tests
    it. If there is only one fold, the column has `train`, `valid` or `test`.

    Args:
        tables: {name that matches `FOLD`: location}.

    Raises:
        CorpusError: a row has no key.
    """
    matches = [match for name in tables if (match := FOLD.match(name))]
    is_only_fold = len({match[2] for match in matches}) == 1
    rows: dict[str, Row] = {}
    for match in sorted(matches, key=lambda match: match[1] == "test"):  # test replaces train
        for row in read_json_lines(tables[match.string]):
            fold = match[2] if match[1] == "test" else "train"
            if row.get("key") is None:
                raise CorpusError(f"{tables[match.string]}: a row has no key")
            rows[str(row["key"])] = {**row, "fold": match[1] if is_only_fold else fold}
    return as_table(rows.values())


def read_kaldi(location: str, files: Sequence[str], find: FindColumns) -> pa.Table:
    """Read a data folder of Kaldi. Each file with lines `UTTERANCE VALUE` becomes a column.

    Raises:
        CorpusError: a recording is the output of a command, or the labels seem to be transcripts.
        TableError: a file is not text in UTF-8 or has two values for an utterance, a segment has no
            recording, start and end, or a recording has no path.
    """

    def read(name: str) -> dict[str, str]:
        try:
            text = read_file(location_inside(location, name)).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise TableError(f"{name} is not text in UTF-8") from error
        values: dict[str, str] = {}
        for line in filter(str.strip, re.split(r"\r\n|\r|\n", text)):
            key, _, value = line.strip().replace("\t", " ").partition(" ")
            if values.setdefault(key, value.strip()) != value.strip():
                raise TableError(f"{name} has two values for {key}")
        return values

    scp = read("wav.scp")
    if pipe := next((name for name, path in scp.items() if path.endswith("|")), None):
        raise CorpusError(f"{location}/wav.scp: {pipe}{_COMMAND}")
    label = next((name for name in _LABEL_FILES if name in files), "text")
    file_of = {{"utt2spk": "speaker", label: "label"}.get(name, name): name for name in files}
    found = find(["path", "start", "end", *file_of])
    columns = {name: read(file_of[name]) for name in found.values() if name in file_of}
    labels = list(columns["label"].values()) if found["label"] == "label" else []
    if label == "text" and sum(" " in text for text in labels) > len(labels) / 2:
        raise CorpusError(
            f"{location}: has no file utt2emo, and its file text seems to hold transcripts, such "
            f"as {labels[0]!r}; name the file with the labels, as in --columns label=utt2mood"
        )
    segments: dict[str, list[Any]] = {name: [name, None, None] for name in scp}
    if "segments" in files:
        segments = {name: text.split() for name, text in read("segments").items()}
        if bad := next((name for name, parts in segments.items() if len(parts) != 3), None):
            raise TableError(f"segments has no recording, start and end for {bad}")
    if bad := next(
        (recording for recording, *_ in segments.values() if not scp.get(recording)), ""
    ):
        raise TableError(f"wav.scp has no path for {bad}")
    return as_table(  # the end -1 means the end of the recording
        {"path": scp[recording], "start": start, "end": None if end == "-1" else end}
        | {column: values.get(name) for column, values in columns.items()}
        for name, (recording, start, end) in segments.items()
    )


def is_lhotse(name: str) -> bool:
    """Return whether a file's name is that of cuts or supervisions of lhotse."""
    return ".jsonl" in name and ("supervisions" in name or "cuts" in name)


def read_lhotse(location: str, files: Sequence[str]) -> pa.Table:
    """Read supervisions and their recordings, or else cuts. Each supervision becomes a clip.

    Args:
        location: the folder.
        files: the names of the files to read in it.

    Raises:
        CorpusError: the file of the recordings is missing, a cut mixes several recordings, or a
            recording is the output of a command.
    """

    def read(name: str) -> list[Row]:
        return read_json_lines(location_inside(location, name))

    rows: list[Row] = []
    names = sorted(name for name in files if is_lhotse(name) and "supervisions" in name)
    for name in names or sorted(filter(is_lhotse, files)):
        found = read(name)
        if not names:
            clips = [clip for cut in found for clip in _clips_of_cut(location, cut)]
        else:
            beside = name.replace("supervisions", "recordings")
            if beside not in files:
                raise CorpusError(f"{location}: has {name}, but not {beside} with its recordings")
            recordings = {row["id"]: row for row in read(beside)}
            clips = [(row, recordings.get(row["recording_id"]), row["start"]) for row in found]
        part = part_of_file(name)
        split = {"split": part} if part else {}
        rows.extend({**split, **_clip_of_lhotse(location, *clip)} for clip in clips)
    return as_table(rows)


def _clips_of_cut(location: str, cut: Row) -> Iterator[tuple[Row, Row | None, float]]:
    """Yield each supervision of a cut, its recording, and its start in the recording in seconds."""
    if "tracks" in cut:
        raise CorpusError(
            f"{location}: the cut {cut['id']} is a mixture of several recordings; save cuts of one "
            "recording each"
        )
    for row in cut.get("supervisions", ()):
        start = max(row["start"], 0.0)
        duration = min(row["start"] + row["duration"], cut["duration"]) - start
        clip = {**row, "duration": duration}
        clip["custom"] = {**(cut.get("custom") or {}), **(row.get("custom") or {})}
        yield clip, cut.get("recording"), round(cut["start"] + start, 6)


def _clip_of_lhotse(location: str, row: Row, recording: Row | None, start: float) -> Row:
    """Return the row of a supervision, which starts at `start` seconds of the recording."""
    sources = (recording or {}).get("sources", ())
    if any(found["type"] == "command" for found in sources):
        raise CorpusError(f"{location}: {row['recording_id']}{_COMMAND}")
    paths = [found["source"] for found in sources if found["type"] in ("file", "url")]
    end = round(start + row["duration"], 6)
    is_whole = start == 0 and recording and abs(end - recording["duration"]) < 0.001
    times = {} if is_whole else {"start": start, "end": end}
    plain = {key: row[key] for key in row if key not in ("start", "custom")}
    return {**(row.get("custom") or {}), **plain, **times, "path": (paths or [None])[0]}


def read_audformat(location: str, files: Sequence[str], find: FindColumns) -> pa.Table:
    """Read a folder of audformat: the labelled clips and their splits.

    The package audformat would run code from the header, and from the pickled tables that `audb`
    stores. Therefore it reads a temporary copy without pickles, in which the header has only plain
    values.

    Raises:
        CorpusError: the package is not installed, the header has values that are not plain, or a
            table exists only as a pickle.
    """
    try:
        import audformat
        import yaml
    except ImportError as error:
        raise CorpusError(
            f"{location}: a folder of audformat needs the package audformat; run "
            "`pip install audformat`"
        ) from error
    with TemporaryDirectory() as folder:
        for name in files:
            if name.startswith("db.") and name.endswith((".yaml", ".csv", ".parquet")):
                Path(folder, name).write_bytes(read_file(location_inside(location, name)))
        header = Path(folder, "db.yaml")
        try:
            plain = yaml.safe_load(header.read_bytes())
        except yaml.YAMLError as error:
            raise CorpusError(
                f"{location}/db.yaml: is not an audformat header with plain values "
                f"({first_line(error)})"
            ) from error
        header.write_text(yaml.safe_dump(plain, sort_keys=False))
        database = audformat.Database.load(folder)
        for name in (*database.tables, *database.misc_tables):
            if not {f"db.{name}.csv", f"db.{name}.parquet"} & set(files):
                raise CorpusError(
                    f"{location}: its table {name} exists only as a pickle, which can run code; "
                    "save the database with the storage_format csv or parquet"
                )
        return _clips_of_audformat(database, find)


def _clips_of_audformat(database: Any, find: FindColumns) -> pa.Table:
    """Return the labelled clips of an `audformat.Database`, and their splits."""
    import audformat

    columns = [column for table in database.tables.values() for column in table.columns]
    properties = [key for scheme in database.schemes.values() if isinstance(scheme.labels, dict)
                  for value in scheme.labels.values() if isinstance(value, dict)
                  for key in value]  # fmt: skip
    names = list(dict.fromkeys([*database.schemes, *columns, *properties]))
    chosen = find(["file", "start", "end", "split", *names])
    wanted = [name for name in chosen.values() if name in names]
    label = chosen["label"]
    frame = database.get(label, [name for name in wanted if name != label])
    frame = frame.set_axis(audformat.utils.to_segmented_index(frame.index))
    part_of = {}
    for name, split in database.splits.items():
        clips = database.get(label, splits=name)
        for clip in audformat.utils.to_segmented_index(clips.index):
            part_of[clip] = split.type
    table = pa.Table.from_pandas(
        frame.reset_index().astype({"file": "string"}), preserve_index=False
    )
    return table.append_column(
        "split", pa.array([part_of.get(clip) for clip in frame.index], pa.string())
    )
