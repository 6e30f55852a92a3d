"""From a manifest to Parquet shards, and back.

`prepare` lists a corpus, cuts it into parts (`plan`), has Ray Data write them (`part`) and says in
a card what the folder holds (`card`); one run at a time, watched (`progress`). `read` opens what
was committed, and needs nothing that decodes sound; `layout` names the files.
"""
