"""Runs searches and cross-validations, with Ray Tune around the training.

space         settings, and the values that a search may draw
start         starts a study: cluster, number of concurrent trials, lock, MLflow run
tuner         a search: plan, run, record the best trial
crossval      a cross-validation: plan, run, record; `pooled` computes its result
tune_run      Ray Tune: searchers, ASHA, retries, resuming
actor         one trial in a process of Ray Tune
study         keeps the records of all trials in the driver, and delivers them to MLflow
trial         the record of one trial
trial_table   the trials on a terminal or in a log
optuna_study  a finished search as an Optuna study
"""
