"""Turns numbers into figures for pages, the demo, notebooks and MLflow."""
