"""MLflow: runs, models and the server of a cluster. The only room that imports it."""
