"""Turns a recording into features: `decode` reads the sound, `transforms` computes the three kinds.

`sandbox` decodes clips that hang or kill the process. Preparing shards and predicting use the same
functions, so both see the same numbers. `encoder` turns sound into the layers of a pretrained
speech encoder, another kind of feature. Nothing here imports Ray.
"""
