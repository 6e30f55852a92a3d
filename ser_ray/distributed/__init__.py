"""Runs one training: in this process or on a cluster, with a folder and an MLflow run.

run_config     settings of a run that are not part of its recipe
launch         the entry point: a training from its shards to its report
task           recipe, shards, folder and settings of a training
local          training in this process
group          training by workers of Ray Train; `worker` is what runs in each of them
process_group  the network of these workers
room           waiting until a cluster has room
ingest         whether training clips stay in memory or are streamed
run_folder     checkpoints, record and lock of a run
mlflow_run     the MLflow run of a training, search or cross-validation
epoch_table    the epochs on a terminal or in a log
node_metrics   utilisation of a node while it trains
range_test     a learning-rate range test

A training survives failures. It resumes from the newest complete checkpoint in its folder
(`run_folder`). `RunConfig.max_failures` limits each of the first four rows by itself:

    what fails                      who starts it again              what is counted
    worker of Ray Train             Ray Train (group.py,             every loss of workers
                                    FailureConfig)
    controller of Ray Train         group.py, WorkerGroup.run        losses in a row without a new
                                                                     checkpoint
    training in this process        local.py, train_here             every failure
    trial of a search or fold       Ray Tune (search/tune_run.py,    every failure of a trial
                                    run_trials)
    driver                          the user, by the same command

A permanent error (`ser_ray.errors.is_permanent`) ends the training at once, because another attempt
fails in the same way. On a cluster, `group.DriverCallback.after_exception` detects such errors.
"""
