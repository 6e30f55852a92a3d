"""The command line. A verb is a dataclass: its fields are the flags, and `run` does the work."""
