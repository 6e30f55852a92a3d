"""MLflow: runs, models and the server of a cluster. The only room that imports it.

store     which store is used, and the connection to it; `database` is one in a sqlite file
tracker   one run, as the driver records it
about     what MLflow shows of a run besides its numbers
registry  runs, recipes, scores and models that are looked up, and registered models
views     links to MLflow's pages
server    the server of a cluster's head; `backups` keep its database in a bucket
"""
