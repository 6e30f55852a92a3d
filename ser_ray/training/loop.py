"""The training loop: `fit` trains one fold from shards, and reports scores and checkpoints.

The loop runs in one process by default. If Ray Train or torchrun has initialised
`torch.distributed`, this process is one of several workers. Batches, learning rates and
augmentation depend on (seed, epoch, step), but not on the number of workers: every worker makes the
complete batch and trains on its own share of the clips. Therefore a run may resume with a different
number of workers. Streamed clips are an exception: their augmentation depends on the number of
workers (see `ser_ray.training.streaming`).

No step waits for the device, because losses and counts are copied from it only once per epoch. A
snapshot is a copy of the training's state, so another thread can write it to storage while the loop
continues.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ser_ray.errors import ConfigError
from ser_ray.shards.read import ShardSet
from ser_ray.training.checkpoint import Snapshot, read_card
from ser_ray.training.checkpoint_card import make_card
from ser_ray.training.data import FoldData, Source, load_fold
from ser_ray.training.model import FRESH, Pretrained
from ser_ray.training.recipe import TrainConfig
from ser_ray.training.streaming import Fetch, stream_fold
from ser_ray.training.trainer import EpochReport, Trainer
from ser_ray.training.world import World

PREEMPTION_CHECK_STEPS = 32
"""Steps between two preemption checks. Each check waits for all workers."""

MakeSnapshot = Callable[[], Snapshot]
"""Copies the current state of the training, for a checkpoint. A `Report` may call this function,
but not after the `Report` has returned."""
Report = Callable[[EpochReport | None, MakeSnapshot], None]
"""Called on every worker: after every epoch with the results of the epoch, and in mid-epoch with
None if `preemption_check` returned True."""


def fit(
    recipe: TrainConfig,
    shards: ShardSet,
    pretrained: Pretrained,
    report: Report,
    *,
    resume: Path | None = None,
    device: torch.device | None = None,
    preemption_check: Callable[[], bool] | None = None,
    stream: Fetch | None = None,
) -> None:
    """Train one fold, from its beginning or from a checkpoint.

    Args:
        recipe: the recipe.
        shards: the shard set to train on.
        pretrained: initial weights of a ResNet18. A head on an encoder starts with fresh weights.
        report: called after every epoch, and after a `preemption_check` that returned True.
        resume: directory of a checkpoint of the same training. If given, the training resumes from
            this checkpoint.
        device: where to train; the CPU by default.
        preemption_check: called on every worker every PREEMPTION_CHECK_STEPS steps. It must return
            the same value on all workers. If the value is True, `report` is called in mid-epoch, so
            that it can write a checkpoint.
        stream: if given, every epoch reads the training clips from the shards with this function.
            The built-in `map` reads them in this process. If None, all clips stay in memory.

    Raises:
        ConfigError: the recipe does not fit the shards or the number of workers.
        ShardsError: the shards cannot be read, or the clips do not fit into memory.
        CheckpointError: the checkpoint is missing or broken, or belongs to another training.
        DivergedError: a loss or a weight is not finite; the message names the epoch.
    """
    world, device = World.current(), device or torch.device("cpu")
    previous = read_card(resume) if resume is not None else None

    data: FoldData[Source]
    if stream is None:
        data = load_fold(shards, recipe, device)
    else:
        normalisation = previous.normalisation if previous is not None else None
        data = stream_fold(shards, recipe, device, world, stream, normalisation)
    require_workers_fit(recipe, len(data.train), world.size)

    if shards.card.encoder_of(recipe.feature) is not None:
        pretrained = FRESH
    trainer = Trainer(recipe, shards.card, data, pretrained, device, world)

    card = make_card(recipe, shards, data, pretrained, "resident" if stream is None else "stream")
    if resume is not None and previous is not None:
        card.require_same(previous, str(resume))
        trainer.restore(Snapshot.read(resume))
    make_snapshot = partial(trainer.snapshot, card)

    while not trainer.finished:
        trainer.begin_epoch()
        while not trainer.epoch_finished:
            trainer.train_step()
            is_due = trainer.completed_steps % PREEMPTION_CHECK_STEPS == 0
            if preemption_check is not None and is_due and preemption_check():
                trainer.reduce_counts()
                trainer.average_batch_norm()  # the first worker stores the checkpoint
                report(None, make_snapshot)
        trainer.finish_steps()
        scores = trainer.validate()
        report(trainer.finish_epoch(scores), make_snapshot)


def require_workers_fit(recipe: TrainConfig, num_clips: int, workers: int) -> None:
    """Raise if there are more workers than clips in a batch or in the training part.

    Raises:
        ConfigError: there are too many workers.
    """
    if recipe.batch_size < workers:
        raise ConfigError(
            f"batch_size is {recipe.batch_size}, but there are {workers} workers: all workers "
            "share a batch, so it must have at least one clip for each worker"
        )
    if num_clips < workers:
        raise ConfigError(f"{num_clips} training clips are too few for {workers} workers")
