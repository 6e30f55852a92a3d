"""The clips: their files, their labels, and the folds of training and testing.

    folder, bucket or table ──manifest──> one row per file ──splits──> train, validation, test rows

manifest       lists a corpus, with `ravdess.names` or `tables`, and `audio_files`
ravdess        RAVDESS: the labels in its file names, its complete file list, its download
tables         custom corpora: a table of clips, in the formats of many tools
audio_files    finds the recordings in folders, or by a pattern
words          names of corpora and columns, and the words for a missing value

mistakes       points out likely mistakes in labels
labels         maps the labels of several corpora to one label set

folds          protocols: the test speakers of every fold
splits         the clips in the train, validation and test part of a fold

synthetic      makes a small corpus with RAVDESS's file names

To read the labels of another corpus from its file names, add a folder like `ravdess`, and call it
from `manifest.list_corpus`. Add the name of the corpus to `words.CorpusKind` and `words.CORPORA`. A
table needs no new code.
"""
