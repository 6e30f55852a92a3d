"""From a manifest to Parquet shards, and back.

`prepare` lists a corpus, cuts it into parts (`plan`), has Ray Data decode and write them (`part`)
and writes a card that says what the folder holds (`card`). `read` opens a finished shard set, and
needs nothing that decodes sound. `layout` names the files, `progress` shows how far a job is.
"""
