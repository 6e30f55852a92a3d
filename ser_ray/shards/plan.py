"""Which files make which part, what of it is committed already, and what a resumed run does again.

The plan is written before the first part, so that a resumed run cuts the manifest as the first one
did, on whatever machine. A part keeps its number as long as any of its files is listed; files that
came since make new parts. Whether a committed part still holds is decided by its key alone.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from ser_ray.errors import ConfigError, ShardsError
from ser_ray.features.config import FeatureConfig
from ser_ray.shards.layout import PLAN_NAME, part_key, write_table

MIN_PARTS = 16
"""A small corpus is cut into at least this many parts, so that more than one core has work."""
_FEATURES = b"ser_ray.features"


@dataclass(frozen=True)
class Plan:
    """The manifest cut into parts."""

    files: pa.Table
    """The manifest with a column `part`, sorted by part and path."""
    features: FeatureConfig
    """What a feature is."""

    @cached_property
    def _slices(self) -> dict[int, tuple[int, int]]:
        """First row and number of rows of each part."""
        found = np.unique(self.files["part"], return_index=True, return_counts=True)
        return {part: (first, count) for part, first, count in np.transpose(found).tolist()}

    @property
    def parts(self) -> list[int]:
        """The parts' numbers, ascending."""
        return list(self._slices)

    def rows(self, part: int) -> pa.Table:
        """The manifest's rows of a part."""
        return self.files.slice(*self._slices[part]).drop_columns("part")

    def num_files(self, parts: Iterable[int]) -> int:
        """Files listed in some of the parts."""
        return sum(self._slices[part][1] for part in parts)

    def key(self, part: int) -> str:
        """What the committed part says of itself if it holds these files and features."""
        return part_key(self.rows(part), self.features)


def make_plan(
    manifest: pa.Table, features: FeatureConfig, rows_per_part: int, before: Plan | None
) -> Plan:
    """Cut a manifest into parts, keeping the numbers that files had `before`."""
    paths = manifest["path"]
    if before is None:
        parts = np.full(len(manifest), -1)
        first = 0
    else:
        known = pc.index_in(paths, value_set=before.files["path"])
        parts = pc.fill_null(before.files["part"].take(known), -1).to_numpy().copy()
        first = pc.max(before.files["part"]).as_py() + 1
    new = np.flatnonzero(parts < 0)
    size = max(1, min(rows_per_part, -(-len(new) // MIN_PARTS)))
    parts[new] = first + np.arange(len(new)) // size
    files = manifest.append_column("part", pa.array(parts, pa.int32()))
    return Plan(files.sort_by([("part", "ascending"), ("path", "ascending")]), features)


def read_plan(filesystem: fs.FileSystem, folder: str) -> Plan | None:
    """Return the plan of an earlier run, if there is one.

    Raises:
        ShardsError: it is of another version, or no plan.
    """
    path = f"{folder}/{PLAN_NAME}"
    try:
        files = pq.read_table(path, filesystem=filesystem)
        features = FeatureConfig(**json.loads(files.schema.metadata[_FEATURES]))
    except FileNotFoundError:
        return None
    except (pa.ArrowInvalid, TypeError, KeyError, ValueError, ConfigError) as error:
        raise ShardsError(
            f"{path}: no plan that this version reads ({error}); give another folder"
        ) from error
    return Plan(files.replace_schema_metadata(None), features)


def write_plan(filesystem: fs.FileSystem, folder: str, plan: Plan) -> None:
    """Write a plan for the runs that resume this one."""
    metadata = {_FEATURES: json.dumps(asdict(plan.features)).encode()}
    write_table(filesystem, f"{folder}/{PLAN_NAME}", plan.files.replace_schema_metadata(metadata))


def require_same_corpus(before: Plan, after: Plan, shards: str) -> None:
    """Refuse to put the shards of one corpus in the place of another's.

    Args:
        before: what the folder holds.
        after: what it is to hold.
        shards: the folder, as the user gave it.

    Raises:
        ShardsError: none of the files that it holds is listed any more.
    """
    known = pc.index_in(after.files["path"], value_set=before.files["path"])
    if known.null_count == len(known) and len(before.files):
        raise ShardsError(
            f"{shards}: holds the shards of another corpus, {len(before.files)} files like "
            f"{before.files['path'][0]}, none of which is in this one: give another folder with "
            "--shards, or delete that one"
        )


def describe_changes(before: Plan, after: Plan) -> list[str]:
    """Say what differs between the plan of an earlier run and this one, a line each."""
    old, new = asdict(before.features), asdict(after.features)
    lines = [
        f"{name} was {old[name]} and is {new[name]}: all features are made again"
        for name in new
        if old[name] != new[name]
    ]
    known = pc.index_in(after.files["path"], value_set=before.files["path"])
    is_new = pc.is_null(known)
    came = pc.sum(is_new).as_py() or 0
    gone = len(before.files) - (len(after.files) - came)
    was = before.files.take(known.filter(pc.invert(is_new))).drop_columns("part")
    now = after.files.filter(pc.invert(is_new)).drop_columns("part")
    changed = sum(a != b for a, b in zip(was.to_pylist(), now.to_pylist(), strict=True))
    for count, what in ((came, "came"), (gone, "went"), (changed, "changed")):
        if count:
            lines.append(f"{count} file{'s'[: count > 1]} {what} since the last run")
    return lines
