"""Ray Train around the training: workers, storage, failures and the run's record."""
