"""The command line: a verb is a dataclass with its `run`."""
