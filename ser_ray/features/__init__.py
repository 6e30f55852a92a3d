"""From a clip to its features: `decode` reads the sound, `transforms` computes the three kinds.

Preparing shards and predicting use the same functions, so both see the same numbers. Nothing here
knows Ray.
"""
