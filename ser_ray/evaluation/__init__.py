"""Turns the predictions of a checkpoint into scores, statistics, pages and a model card.

evaluate      a checkpoint and shards -> an `evaluation`: the predictions and their scores
statistics    intervals, calibration, paired comparisons
robustness    scores under simulated recording conditions
pages         the HTML pages of runs
sections      the sections that several pages share, such as tables and clips
rendering     fills the templates in `templates/`, and stores pages
to_mlflow     records trainings and evaluations in MLflow, and registers models
introduction  text and example clips for the demo page
"""
