"""Turns a checkpoint's predictions into scores, statistics, a model card and pages."""
