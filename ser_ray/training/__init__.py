"""Tensors to a checkpoint: the recipe, the loop in plain torch, and Ray Train around it."""
