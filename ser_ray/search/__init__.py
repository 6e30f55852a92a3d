"""Runs searches and cross-validations, with Ray Tune around the training."""
