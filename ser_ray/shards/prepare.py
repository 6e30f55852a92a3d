"""Turns a corpus into shards, with a Ray Data job that has one task for each shard of a plan.

Each block of the dataset has one shard's rows of the manifest. A task decodes their files, writes
the shard and returns the number of files by status. If the command is given again, it writes only
the missing shards of the `plan`. The card is written when all shards are committed.

The tasks write the shards themselves; `write` says why Ray Data does not write them. Another design
was tried, in which an actor pool decodes and a second operator writes. It takes 27 s instead of 7 s
for 1,440 clips on two CPUs, because Ray Data copies the features from one operator to the other.
"""

import contextlib
import socket
import sys
import time
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from ser_ray.cluster.connect import cluster
from ser_ray.cluster.shared_files import one_of_each_folder, require_kept, require_shared
from ser_ray.corpus.manifest import Corpus, exclude, list_corpus
from ser_ray.corpus.mistakes import describe_clips, find_mistakes
from ser_ray.corpus.tables.clips import MISSING_FILES
from ser_ray.corpus.words import shorten
from ser_ray.errors import CorpusError, ShardsError
from ser_ray.features.transforms import FeatureExtractor
from ser_ray.progress import Report
from ser_ray.shards import layout
from ser_ray.shards.card import ShardCard, make_card, read_card, write_card
from ser_ray.shards.config import PrepareConfig, column_names
from ser_ray.shards.encode import add_encoders, load_encoders
from ser_ray.shards.job import AGAIN, run_job, set_up_ray_data, shard_result
from ser_ray.shards.plan import (
    Plan,
    describe_changes,
    make_plan,
    read_committed,
    require_same_corpus,
    restore_times,
    update_times,
)
from ser_ray.shards.read import ShardSet
from ser_ray.shards.write import write_shard
from ser_ray.storage.atomic import atomic_write
from ser_ray.storage.listing import NO_FILE
from ser_ray.storage.lock import FolderLock
from ser_ray.storage.paths import absolute, filesystem_of, location_inside

MISSING_NAME = "missing.csv"
"""A file in the shard set that lists missing files. The table of the corpus names these files, but
they do not exist."""
NAMES_SHOWN = 3
"""Number of missing files that a warning names."""


@dataclass(frozen=True)
class PrepareSummary:
    """The result of a run of `prepare`."""

    card: ShardCard
    """The card of the shard set."""
    notes: tuple[str, ...]
    """Lines about changes since an earlier run (`describe_changes`)."""
    files_done: int
    """Number of files, or segments of files, in the shards that this run wrote."""
    seconds: float
    """Duration of this run."""
    num_files: int | None
    """Number of different files if some rows are segments of files; otherwise None."""
    contents: str
    """The number of clips by label and the number of speakers, as text."""
    warnings: tuple[str, ...]
    """Lines about files that are left out or missing, clips that are cut into windows, incomplete
    columns of encoders, and likely mistakes in the corpus."""

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {status}" for status, count in self.card.counts.items())
        of_files = f"segments of {self.num_files} files" if self.num_files else "files"
        lines = [
            f"{self.card.num_files} {of_files}: {counts}",
            f"{self.files_done} of them prepared now, in {self.seconds:.1f} s",
            self.contents,
            *(
                f"encoder {item.name}: {item.num_layers} layers of {item.dim} values a clip, "
                f"{item.licence}, weights {item.weights[:16]}"
                for item in self.card.encoders
            ),
            *(f"note: {warning}" for warning in self.warnings),
        ]
        return "\n".join(lines)


def prepare(
    config: PrepareConfig,
    *,
    listed: Corpus | None = None,
    address: str = "",
    progress: Report | None = None,
) -> PrepareSummary:
    """Write the missing shards of a corpus, add the features of encoders, and write the card.

    Args:
        config: which clips become shards, with which features, and where the shards are written.
        listed: the corpus, if the caller has listed it already.
        address: cluster to join, as for `cluster.connect.cluster`; unused if nothing is missing.
        progress: called after every shard. If None, the changes since an earlier run, and then a
            bar or log lines, are printed on standard error.

    Raises:
        CorpusError: no corpus is found, all files of a table are missing, the folder of one of them
            is missing, or no file becomes a clip.
        ConfigError: an encoder or a column is unknown, the sample rate is not that of the encoders,
            or no filesystem can open a location.
        ShardsError: another run writes to the folder, the folder holds another corpus or other
            files, a shard or a recording cannot be read, a shard could not be written, or a job
            failed.
        LockLostError: another process has taken over the shard set.
        EncoderError: the weights of an encoder cannot be loaded, or differ from those in the shard
            set.
        ResourcesError: no cluster answers, a node cannot open the corpus or the shards, or Ray
            deletes one of them after the job.
    """
    started = time.monotonic()
    for location in (config.corpus, config.shards):
        require_kept(location)
    corpus = listed or list_corpus(config.corpus, config.missing, column_names(config.columns))
    manifest = exclude(corpus.manifest, config.include)
    encoders = load_encoders(config.shards, config.encoder, config.features)
    try:
        with FolderLock(
            config.shards,
            ShardsError,
            activity="is writing these shards",
            advice="wait until it ends, or choose another folder",
        ) as lock:
            layout.require_no_other_files(config.shards)
            missing = _report_missing(manifest, config)
            committed = read_committed(config.shards)
            require_same_corpus(committed, manifest, config.shards)
            restored = restore_times(manifest, committed)
            plan = make_plan(restored, config.features, config.rows_per_shard, committed)
            notes = describe_changes(committed, config.features, plan)
            if progress is None:
                print(*notes, sep="\n", end="\n" if notes else "", file=sys.stderr, flush=True)
            kept = {number: committed[number] for number in plan.kept}
            update_times(config.shards, manifest, restored, kept)
            card = read_card(config.shards)
            with cluster(address) if plan.pending else contextlib.nullcontext():
                if card is None or plan.pending or card.shard_numbers != tuple(plan.kept):
                    card = _complete(config, corpus, plan, lock, progress)
                outcomes = ShardSet(config.shards, card).outcomes()
                if card.num_rows == 0:
                    first = outcomes.slice(0, 1).to_pylist()[0]
                    raise CorpusError(
                        f"{config.corpus}: none of its {len(outcomes)} files became a clip; "
                        f"{first['path']} is {first['status']}: {first['reason']}"
                    )
                card, lacking = add_encoders(config.shards, card, encoders, lock, address, progress)
    except OSError as error:
        where = error.filename or config.shards
        raise ShardsError(f"{where}: {error.strerror or error}{AGAIN}") from error
    warnings = [*corpus.notes, *missing]
    if card.num_rows > (num_ok := card.counts[layout.OK]):
        warnings.append(
            f"{num_ok} clips have {card.num_rows} rows in the shards, because a clip with more "
            f"than {card.features.max_seconds:g} s of sound has one row for each of its windows"
        )
    is_segmented = pc.any(pc.is_valid(outcomes["start"])).as_py()
    return PrepareSummary(
        card=card,
        notes=notes,
        files_done=plan.num_pending,
        seconds=time.monotonic() - started,
        num_files=len(pc.unique(outcomes["path"])) if is_segmented else None,
        contents=describe_clips(outcomes.filter(pc.equal(outcomes["status"], layout.OK))),
        warnings=(*warnings, *lacking, *find_mistakes(outcomes)),
    )


def _complete(
    config: PrepareConfig, corpus: Corpus, plan: Plan, lock: FolderLock, progress: Report | None
) -> ShardCard:
    """Write the pending shards, delete the shards that are not in the plan, and write the card.

    Raises:
        ShardsError: a shard could not be written, or the job failed.
        LockLostError: another process has taken over the shard set.
        ResourcesError: a node cannot open the corpus or the shards.
    """
    filesystem, folder = filesystem_of(config.shards)
    if plan.pending:
        import ray.data

        to_open = (rows.filter(pc.is_null(rows["status"])) for rows in plan.pending.values())
        paths = (path for rows in to_open for path in pc.unique(rows["path"]).to_pylist())
        require_shared(config.corpus, config.shards, *one_of_each_folder(paths))
        layout.keep_only(config.shards, plan.kept)
        for name in (layout.OUTCOMES, layout.CLIPS):
            filesystem.create_dir(f"{folder}/{name}")
        set_up_ray_data()
        blocks = [
            rows.append_column("shard", pa.array([number] * len(rows), pa.int32()))
            for number, rows in plan.pending.items()
        ]
        results = ray.data.from_arrow(blocks).map_batches(
            _write_in_worker,
            fn_args=(absolute(config.shards), FeatureExtractor(config.features)),
            batch_size=None,
            batch_format="pyarrow",
        )
        before = plan.num_files - plan.num_pending
        run_job(results, config.shards, lock, plan.num_files, before, progress)
    layout.keep_only(config.shards, plan.shard_numbers)
    card = make_card(config.shards, corpus, config.features, plan.shard_numbers)
    assert card.num_files == plan.num_files, "one outcome for every listed file"
    write_card(config.shards, card)
    return card


def _report_missing(manifest: pa.Table, config: PrepareConfig) -> list[str]:
    """List the missing files of a table in missing.csv, and return a line about them.

    If no file is missing, missing.csv is deleted, and the result is empty.

    Raises:
        CorpusError: no file of the table exists, the folder of a file does not exist, perhaps
            because a disk is not mounted, or a path is a Windows path, which does not exist here.
    """
    is_missing = pc.is_in(manifest["reason"], value_set=pa.array(MISSING_FILES))
    rows = manifest.filter(is_missing).select(["path", "reason"])
    rows = rows.group_by(["path", "reason"], use_threads=False).aggregate([])
    num_files = len(pc.unique(manifest["path"]))
    if len(rows) == 0:
        layout.delete(config.shards, MISSING_NAME)
        return []
    filesystem, listing = filesystem_of(location_inside(config.shards, MISSING_NAME))
    with atomic_write(filesystem, listing) as stream:
        pa.csv.write_csv(rows, stream)
    names = [f"{row['path']} ({row['reason']})" for row in rows.to_pylist()]
    text = (
        f"{len(rows)} of {num_files} files do not exist: {shorten(names, NAMES_SHOWN)}; all of "
        f"them are listed in {config.shards}/{MISSING_NAME}"
    )
    if len(rows) == num_files or set(rows["reason"].to_pylist()) != {NO_FILE}:
        raise CorpusError(
            f"{config.corpus}: {text}. Relative paths start at the table's folder or, if it has "
            "none of the files, at the nearest of the four folders above it that has one"
        )
    return [text]


def _write_in_worker(rows: pa.Table, shards: str, extractor: FeatureExtractor) -> pa.Table:
    """Write the shard with these rows in a worker, and return its `shard_result`."""
    number = rows["shard"][0].as_py()

    def write() -> dict[str, int]:
        if layout.names_in(shards, layout.OUTCOMES) is None:
            raise OSError(
                f"{socket.gethostname()} does not see the shards' folder; with several machines, "
                "shards must be in a bucket or on a disk that all machines mount"
            )
        return write_shard(shards, number, rows.drop_columns("shard"), extractor)

    return shard_result(layout.clips_name(number), write)
