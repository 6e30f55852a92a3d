"""A checkpoint's answers to scores, statistics, a model card and pages."""
