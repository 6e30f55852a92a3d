"""Words: names of corpora, of table columns, of a split's parts, and of a missing value.

`--help` imports this module, so it imports nothing slow.
"""

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
"""{kind of corpus: its name in the captions of scores}."""
MISSING_WORDS = (
    "nan", "-nan", "na", "n/a", "<na>", "null", "(null)", "none", "nil", "nat", "n.a.", "n.a",
    "#n/a", "#n/a n/a", "#na", "#null!", "#ref!", "#value!", "#name?", "#num!", "#div/0!", "1.#ind",
    "-1.#ind", "1.#qnan", "-1.#qnan", "\\n", "?", "-", "--", "\u2013", "\u2014", ".",
)  # fmt: skip
"""What spreadsheets, pandas, R, SPSS and databases write for a missing value, in lower case."""
COLUMNS = {
    "path": ("path", "file", "wav", "audio", "file_name", "filename", "audio_path"),
    "label": ("label", "emotion", "emo"),
    "speaker": ("speaker", "spk", "speaker_id"),
    "take": ("take",),
    "start": ("start", "start_time"),
    "end": ("end", "end_time"),
    "split": ("split", "fold"),
}
"""{column of a corpus: its possible names in a table}. The first name that matches is read."""
PARTS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation",
    "val": "validation", "dev": "validation", "devel": "validation", "test": "test",
}  # fmt: skip
"""{value in the column `split`: part of the split}. Other values are names of folds."""
_PART_IN_NAME = re.compile(rf"(?:.*[-_.])?({'|'.join(PARTS)})\d*[-_.]", re.IGNORECASE)


def part_of_file(name: str) -> str | None:
    """Return the part of the split that a file's name contains, as in mine_dev.csv, or None."""
    match = _PART_IN_NAME.match(name)
    return PARTS[match[1].lower()] if match else None


def shorten(names: Sequence[str], shown: int = 8) -> str:
    """Join the first `shown` names, and append the number of the others."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
