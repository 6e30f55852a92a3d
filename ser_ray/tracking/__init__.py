"""Records runs in MLflow, looks up runs and models, and serves MLflow on a cluster.

store         chooses the tracking store and connects to it
database      prepares a sqlite file as a tracking store
tracker       records one run
run_metadata  makes the tags, data set and description of a run
registry      looks up runs, recipes, scores and models, and registers models
views         makes links to MLflow's pages, and saves a table of runs there
server        runs MLflow's server on the head node of a cluster
backups       keeps the server's database in a bucket

No other folder imports MLflow.
"""
