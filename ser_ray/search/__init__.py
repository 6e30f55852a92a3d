"""Runs searches and cross-validations, with Ray Tune around the training. Both are studies.

config           settings of searches and cross-validations
space            the fields of the recipe that a search draws, and their possible values
slots            counts the trials that fit on the cluster at once, from the `SlotConfig` in config
tuner            a search: plan the trials, run them, record the best
crossval         a cross-validation: plan the folds, run them, record their scores
open_study       starts or resumes a study: cluster, lock, MLflow run
tune_run         runs the trials with Ray Tune: searchers, ASHA, retries, resuming
actor            one trial in a process of Ray Tune
study            keeps the records of all trials in the driver, and delivers them to MLflow
trial            the record of one trial
trial_table      shows the trials on a terminal or in a log
fold_files       the checkpoint and the predictions of a fold
crossval_result  the predictions of all folds in one table, and their scores
optuna_study     converts a finished search to an Optuna study
"""
