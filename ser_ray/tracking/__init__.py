"""Records runs in MLflow, looks up runs and models, and serves MLflow on a cluster.

store     chooses the tracking store and connects to it; `database` handles a sqlite file
tracker   records one run
about     tags, data set and description of a run
registry  looks up runs, recipes, scores and models, and registers models
views     links to MLflow's pages
server    the server of a cluster's head; `backups` keeps its database in a bucket

No other folder imports MLflow.
"""
