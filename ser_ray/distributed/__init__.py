"""Runs one training: in this process or on a cluster, with a folder and an MLflow run.

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

An error that another attempt would meet again (`ser_ray.errors.is_permanent`) ends the training at
once; on a cluster, `group.DriverCallback.after_exception` finds it.
"""
