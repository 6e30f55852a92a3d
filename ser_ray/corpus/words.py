"""The words that tables have for the same things. `--help` imports this, so it imports nothing."""

from collections.abc import Sequence

MISSING_WORDS = (
    "nan", "-nan", "na", "n/a", "<na>", "null", "none", "nil", "nat", "#n/a", "#na", "#null!", "?",
    "-", "--",
)  # fmt: skip
"""What spreadsheets, pandas and R write where there is no value; case does not matter."""

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
"""What the column `split` says. Other values are folds, and each is the test side of its own."""


def shorten(names: Sequence[str], shown: int) -> str:
    """Join the first names and count the others."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
