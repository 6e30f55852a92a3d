"""Trains a network on features and writes checkpoints, in plain torch, without Ray or MLflow.

recipe           the settings of a training
parts            the clips of a fold's train, validation and test part
data             shards -> clips in memory -> batches
streaming        clips that do not fit into memory: every epoch reads them from the shards
augment          random changes of a batch: crop, MixStyle, level, SpecAugment, mixup
acoustics        the augmentation with noise, echo and narrow channels
model            ResNet18, the head on a speech encoder, and their initial weights
optim            the optimiser AdamW and the OneCycle schedule
loop             `fit`, which trains one fold from the start or from a checkpoint
trainer          the state of a training, its steps, its validation and its snapshots
scoring          clips -> probabilities
metrics          confusion matrix -> WA, UA and F1; the selected epoch
calibration      probabilities of the validation clips -> temperature
checkpoint       reads and writes the files of a checkpoint
checkpoint_card  describes the weights of a checkpoint
lr_range         the learning-rate range test
world            this worker's rank and the number of workers
"""
