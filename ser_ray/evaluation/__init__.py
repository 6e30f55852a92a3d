"""From a checkpoint's predictions to scores, statistics, a model card and pages."""
