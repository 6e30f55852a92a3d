"""The clips: their files, their labels, and the folds of training and testing.

    folder, bucket or table ──manifest──> one row per file ──splits──> train, validation, test rows

Listing, by `manifest`:

ravdess        RAVDESS's file names, from which all of its labels come. Another corpus that has its
               labels in its file names needs a table, or a module like this one
table          a table of clips that the user wrote
table_formats  the tables of other tools: audformat, EmoBox, Hugging Face, Kaldi, lhotse
audio_files    which files are recordings
words          names of corpora and columns, and the words for a missing value

Looking at what was listed: `census` compares it with the complete RAVDESS, and `slips` points out
likely mistakes in its labels. `splits` defines the folds. `download` gets RAVDESS with `fetch` and
`unpack`, and `synthetic` makes a small corpus with the same file names.
"""

from ser_ray.corpus.ravdess import EMOTIONS, ClipName, NameProblem, format_name, parse_name

__all__ = ["EMOTIONS", "ClipName", "NameProblem", "format_name", "parse_name"]
