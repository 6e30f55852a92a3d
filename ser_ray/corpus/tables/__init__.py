"""Custom corpora: a table with the file, label and speaker of every clip.

clips     chooses the columns, checks the values, and finds the files of the clips
formats   tells which format a table or folder has, and reads it
files     reads one file as a table: separated text, JSON lines, Parquet
tools     reads the folders of other tools: audformat, EmoBox, Kaldi, lhotse
"""
