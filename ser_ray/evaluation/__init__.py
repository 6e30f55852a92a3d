"""Turns a checkpoint's predictions into scores, statistics, a model card and pages.

evaluate      a checkpoint and shards -> an `evaluation`: the predictions and their scores
statistics    intervals, calibration, paired comparisons
tables        scores by label and by group of clips
robustness    scores under other recording conditions
clips         reads the clips that a page shows
pages         the HTML pages of runs; `sections` are shared by several pages
rendering     fills `templates/`, and stores pages
to_mlflow     records trainings and evaluations in MLflow, and registers models
introduction  introduces a model on the demo page
"""
