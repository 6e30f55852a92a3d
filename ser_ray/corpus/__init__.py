"""The clips: their files, their labels, and the folds of training and testing.

    folder, bucket or table ──manifest──> one row per file ──splits──> train, validation, test rows

manifest       lists a corpus, with the next seven modules
ravdess        the file names of RAVDESS, which hold its labels. Another corpus with labels in its
               file names needs a table, or a module like this one
table          a table of clips that the user wrote
table_files    one file as a table: separated text, JSON lines, Parquet
table_tools    the folders of other tools: audformat, EmoBox, Kaldi, lhotse
table_formats  which of these a table or folder is
audio_files    which files are recordings
words          names of corpora and columns, and the words for a missing value

census         compares the listed files with the complete RAVDESS
mistakes       points out likely mistakes in labels
labels         the labels of several corpora as one label set

folds          protocols: the test speakers of every fold
splits         the clips on the train, validation and test side of a fold

download       gets RAVDESS from Zenodo, with `fetch` and `unpack`
synthetic      makes a small corpus with RAVDESS's file names
"""

from ser_ray.corpus.ravdess import EMOTIONS, ClipName, NameProblem, format_name, parse_name

__all__ = ["EMOTIONS", "ClipName", "NameProblem", "format_name", "parse_name"]
