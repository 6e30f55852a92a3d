"""Turns a checkpoint's predictions into scores, statistics, a model card and pages.

evaluate      a checkpoint and shards -> an `evaluation`: the predictions and their scores
statistics    intervals, calibration, paired comparisons
robustness    scores under other recording conditions
pages         the HTML pages of runs; `sections`, with tables and clips, are shared by several
rendering     fills `templates/`, and stores pages
to_mlflow     records trainings and evaluations in MLflow, and registers models
introduction  introduces a model on the demo page
"""
