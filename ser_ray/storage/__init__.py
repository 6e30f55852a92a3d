"""Files on disks and in buckets.

paths      a path or URI -> a filesystem and a path on it
listing    all files below a folder or in a bucket
atomic     writing a file completely or not at all
json_text  JSON that every program can read
tensors    weights in untrusted files
packed     recordings inside the rows of Parquet files
lock       lets only one process at a time write into a folder
"""
