"""Names of corpora and of columns in tables. `--help` imports this module, so it must be fast."""

import re
from collections.abc import Sequence
from typing import Literal

CorpusKind = Literal["ravdess", "synthetic", "table", "several"]
CORPORA = {
    "ravdess": "RAVDESS",
    "synthetic": "the synthetic corpus",
    "table": "a custom corpus",
    "several": "several corpora",
}
"""The kinds of corpus, and their names, which are printed next to every score."""
MISSING_WORDS = (
    "nan", "-nan", "na", "n/a", "<na>", "null", "none", "nil", "nat", "n.a.", "#n/a", "#na",
    "#null!", "#ref!", "#value!", "#name?", "?", "-", "--",
)  # fmt: skip
"""Words that spreadsheets, pandas and R write for a missing value, in upper or lower case."""
COLUMNS = {
    "path": ("path", "file", "wav", "audio", "file_name", "filename", "audio_path"),
    "label": ("label", "emotion", "emo"),
    "speaker": ("speaker", "spk", "speaker_id"),
    "take": ("take",),
    "start": ("start", "start_time"),
    "end": ("end", "end_time"),
    "split": ("split", "fold"),
}
"""The columns of a corpus, and the possible names of each in a table. The first match is read."""
PARTS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation",
    "val": "validation", "dev": "validation", "devel": "validation", "test": "test",
}  # fmt: skip
"""The part that each value of the column `split` means. Other values are names of folds."""
_PART_IN_NAME = re.compile(rf"(?:.*[-_.])?({'|'.join(PARTS)})\d*[-_.]", re.IGNORECASE)


def part_of_file(name: str) -> str | None:
    """Return the part of the rows in a file by its name, such as mine_dev.csv."""
    match = _PART_IN_NAME.match(name)
    return PARTS[match[1].lower()] if match else None


def shorten(names: Sequence[str], shown: int) -> str:
    """Join the first names, and add the number of the others."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
