"""Files on disks and in buckets.

paths      a path or URI -> a filesystem and a path on it
listing    lists all files below a folder or in a bucket
atomic     writes a file completely or not at all
json_text  writes JSON that every program can read, and reads untrusted JSON
tensors    reads weights from untrusted files
packed     reads recordings that are stored in rows of Parquet files
lock       lets only one process at a time write into a folder
"""
