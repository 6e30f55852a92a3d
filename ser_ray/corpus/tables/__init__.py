"""Custom corpora: a table with the file, label and speaker of every clip.

columns   chooses the columns of a table, and checks their values
clips     finds the file of every row
formats   recognises the format of a table or folder, and reads it with `files` or `tools`
files     reads one file as a table: separated text, JSON lines, Parquet
tools     reads the folders of other tools: audformat, EmoBox, Kaldi, lhotse
"""
