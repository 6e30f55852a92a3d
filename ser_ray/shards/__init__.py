"""Turns a corpus into Parquet shards, and reads them back.

`prepare` lists a corpus, cuts it into parts (`plan`), has Ray Data decode and write them (`part`)
and writes a card that describes the shard set (`card`). `encode` adds the columns of pretrained
encoders to a set. `read` opens a finished one and imports nothing that decodes sound. `layout`
names the files, `progress` shows how far a job is.
"""
