"""The Ray cluster, or Ray on this machine.

connect       joins a cluster, or starts Ray on this machine
local_ray     the temporary folder, signals and settings of a Ray that starts on this machine
resources     CPUs, GPUs and memory that workers can use
shared_files  checks that all nodes can open a job's files, and that Ray keeps the job's outputs
"""
