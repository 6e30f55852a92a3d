"""Files on disks and in buckets: paths and URIs, listings, atomic writes, and locks of folders."""
