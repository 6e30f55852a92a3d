"""Words in a table that mean a missing value. `--help` imports this, so it imports nothing."""

MISSING_WORDS = (
    "nan", "-nan", "na", "n/a", "<na>", "null", "none", "nil", "nat", "#n/a", "#na", "#null!", "?",
    "-", "--",
)  # fmt: skip
"""What spreadsheets, pandas and R write where there is no value; case does not matter."""
