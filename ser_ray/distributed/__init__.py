"""Runs the training on a cluster, with Ray Train: workers, storage, failures, the run's record."""
