"""Features to a checkpoint: the recipe, the data, the network and the loop, without Ray."""
