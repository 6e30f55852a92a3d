"""Trains a checkpoint on features, in plain torch: nothing here imports Ray or MLflow.

recipe       the settings of a training
parts        the clips of a fold's training, validation and test part
data         shards -> resident tensors -> batches; `streaming` reads what does not fit
augment      random changes of a batch; `acoustics` adds noise, echo and narrow channels
model        ResNet18, the head on an encoder, and the weights they start from
optim        AdamW and OneCycle
loop         training from its beginning, or from a checkpoint, to its end
trainer      the state of a training: its steps, its scores and its snapshots
scoring      clips -> probabilities; `metrics` makes scores of them, `calibration` a temperature
checkpoint   weights and state of a training, as files; `checkpoint_card` describes them
lr_range     the learning-rate range test
world        the workers of a training, as torch.distributed knows them
"""
