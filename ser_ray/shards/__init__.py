"""Turns a corpus into Parquet shards, and reads them back.

config    settings of `prepare`
prepare   the job: lists the corpus, makes a plan, lets Ray Data write the shards, writes the card
plan      which files belong to which shard, and which committed shards are still valid
write     decodes the files of a shard, and writes its clips and outcomes
encode    adds the features of pretrained encoders to a shard set; `column` writes one shard
card      the description of a shard set; writing it commits the set
read      opens a finished shard set, without importing anything that decodes sound
corpora   opens several shard sets as one
layout    the names and the format of the files
digest    compares the bytes of files
job       runs a Ray Data job over shards
progress  counts files, and groups items; `inference` uses it too
"""
