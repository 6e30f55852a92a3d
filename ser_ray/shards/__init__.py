"""Turns a corpus into Parquet shards, and reads them back.

config    settings of `prepare`
prepare   the job: it lists the corpus, plans, and has Ray Data write the parts, then the card
plan      which files belong to which part, and which committed parts are still valid
part      the files of one part -> its clips and outcomes
encode    adds the columns of pretrained encoders to a set
card      the description of a shard set, which commits it
read      opens a finished shard set; imports nothing that decodes sound
corpora   several shard sets as one
layout    the names and the format of the files
digest    compares the bytes of files
progress  files done, rate and time left, and groups of items; `inference` uses it too
"""
