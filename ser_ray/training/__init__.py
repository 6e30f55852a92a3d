"""Trains a checkpoint on features: the recipe, the data, the network and the loop, without Ray."""
