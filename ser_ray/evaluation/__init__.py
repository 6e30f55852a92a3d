"""Turns a checkpoint's predictions into scores, statistics, a model card and pages.

evaluate      a checkpoint and shards -> an `evaluation`: the predictions and their scores
statistics    intervals, calibration, paired comparisons
robustness    scores under other recording conditions
clips         the clips that a page shows, read again
pages         the HTML pages of runs, from `templates/` by `rendering`
to_mlflow     trainings and evaluations into their MLflow runs; registered models
introduction  what the demo page says of a model
"""
