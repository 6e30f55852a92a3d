"""Where files are: paths and URIs, listings, atomic writes, and one writer for a folder."""
