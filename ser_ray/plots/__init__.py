"""Numbers to figures, for pages, the demo, notebooks and MLflow alike."""
