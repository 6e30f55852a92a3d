"""Names of corpora and of the columns of tables. `--help` imports this: it imports nothing slow."""

from collections.abc import Sequence
from typing import Literal

CorpusKind = Literal["ravdess", "synthetic", "table", "several"]
CORPORA = {
    "ravdess": "RAVDESS",
    "synthetic": "the synthetic corpus",
    "table": "a custom corpus",
    "several": "several corpora",
}
"""The kinds of corpus, and the name of each that is printed next to every score."""
MISSING_WORDS = (
    "nan", "-nan", "na", "n/a", "<na>", "null", "none", "nil", "nat", "#n/a", "#na", "#null!", "?",
    "-", "--",
)  # fmt: skip
"""What spreadsheets, pandas and R write for a missing value, in any case."""
COLUMNS = {
    "path": ("path", "file", "wav", "audio", "file_name", "filename", "audio_path"),
    "label": ("label", "emotion", "emo"),
    "speaker": ("speaker", "spk", "speaker_id"),
    "take": ("take",),
    "start": ("start", "start_time"),
    "end": ("end", "end_time"),
    "split": ("split", "fold"),
}
"""The columns of a corpus, and the names that each has in tables; the first one found is read."""
SIDES = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation",
    "val": "validation", "dev": "validation", "devel": "validation", "test": "test",
}  # fmt: skip
"""The sides that values of the column `split` mean. Any other value is the name of a fold."""


def shorten(names: Sequence[str], shown: int) -> str:
    """Join the first names, and say how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
