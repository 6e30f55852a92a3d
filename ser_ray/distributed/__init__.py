"""Runs one training, in this process or on Ray, with a run folder and an MLflow run.

train          the entry point: from shards to a checkpoint and its report
run_config     settings of a run that are not part of its recipe
run_folder     the checkpoints, record and lock of a run
mlflow_run     starts or resumes an MLflow run
in_process     trains with one worker in this process
worker_group   trains with workers of Ray Train; each of them runs `worker`
process_group  connects these workers through torch.distributed
placement      waits until a cluster has free CPUs or GPUs
ingest         decides whether training clips stay in memory, and reads streams of clips
epoch_table    shows the epochs on a terminal or in a log
node_metrics   measures the utilisation of a node while it trains
lr_range       runs a learning-rate range test

A run folder and its MLflow run have the same name. It is the value of `--name`, or else made by
`run_name` (train.py), `name_like` (tracking/registry.py), `run_lr_range` (lr_range.py),
`search_name` (search/tuner.py) or `crossval_name` (search/crossval.py). A range test adds a number
to the name if a run already uses the folder.

An interrupted training resumes from the newest complete checkpoint in its run folder.
`RunConfig.max_failures` limits the failures in each of the first four rows separately:

    what fails                     what starts it again            what is counted
    a worker of Ray Train          Ray Train: `FailureConfig` in   every loss of workers
                                   worker_group.py
    the controller of Ray Train    `WorkerGroup.run` in            losses in a row without a new
                                   worker_group.py                 checkpoint
    a training in this process     `train_in_process` in           every failure
                                   in_process.py
    a trial of a search or         Ray Tune: `run_trials` in       every failure of the trial
    cross-validation               search/tune_run.py
    the driver                     the user, with the same command

If Ray knows that a node was preempted, the loss of its workers and trials is not counted.
A permanent error (`ser_ray.errors.is_permanent`) ends the training at once, because another attempt
would fail in the same way. In the controller of Ray Train, `DriverCallback.after_exception`
(worker_group.py) detects such errors.
"""
