"""The clips: their files, their labels, and the folds of training and testing.

    folder, bucket or table ──manifest──> one row per file ──splits──> train, validation, test rows

`ravdess` reads RAVDESS file names, `manifest` lists RAVDESS in any layout or the user's own corpus,
`census` compares a listing with the complete RAVDESS, `splits` defines the folds, `synthetic` makes
a small corpus with the same file names, and `download` gets RAVDESS with `fetch` and `unpack`. Only
`ravdess` is imported with the package, because it imports nothing heavy.
"""

from ser_ray.corpus.ravdess import EMOTIONS, ClipName, NameProblem, format_name, parse_name

__all__ = ["EMOTIONS", "ClipName", "NameProblem", "format_name", "parse_name"]
