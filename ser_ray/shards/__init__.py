"""Turns a corpus into Parquet shards, and reads them back.

config        settings of `prepare`
prepare       the command: lists the corpus, makes a plan, writes the shards with Ray Data, and
              writes the card
plan          decides which files belong to which shard, and which old shards are still valid
write         decodes the files of one shard, and writes its clips and outcomes
encode        adds the features of pretrained encoders to a shard set, with Ray Data
encode_shard  encodes the clips of one shard
card          describes a shard set; writing the card commits the set
read          opens a finished shard set, without importing anything that decodes sound
corpora       opens several shard sets as one
layout        the names and the format of the files
digest        hashes files and samples, to find out whether they are equal
job           runs a Ray Data job with one task for each shard
"""
