"""Runs searches and cross-validations, with Ray Tune around the training.

space         settings, and the values that a search may draw
slots         how many trials run at once
tuner         a search: plan, run, record the best trial
crossval      a cross-validation: plan, run, record; `pooled` holds its result
tune_run      Ray Tune: searchers, ASHA, retries, resuming
actor         one trial inside a process of Ray Tune
study         the driver's side: the records of all trials, and their delivery to MLflow
trial         the record of one trial
trial_table   the trials on a terminal or in a log
optuna_study  a finished search as an Optuna study
"""
