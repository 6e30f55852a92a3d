"""Ray Tune around the training: searches and cross-validations."""
