"""The training loop in plain torch: tensors in, checkpoints and scores out.

By itself the loop trains in one process. Where Ray Train or torchrun has initialised
`torch.distributed`, it is one worker of several. Batches, learning rates and augmentation are
functions of (seed, epoch, step), not of the number of workers: every worker draws the complete
batch and trains on each world-size-th clip of it, so a run may change its number of workers and
stay the same run. (Streamed clips keep less of this: see `ser_ray.training.streaming`.)

Nothing in a step waits for the device: counts and losses leave it once an epoch. A checkpoint is a
copy of the training's state, which another thread may write while the loop continues.
"""

import copy
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from ser_ray.errors import ConfigError, DivergedError, MismatchError
from ser_ray.features.config import FeatureConfig
from ser_ray.shards.read import ShardSet
from ser_ray.training.augment import Augment, gain_response
from ser_ray.training.checkpoint import VALIDATION, CheckpointCard, Snapshot, read_card
from ser_ray.training.config import TrainConfig
from ser_ray.training.data import (
    Batch,
    FoldData,
    Source,
    describe_split,
    load_fold,
    seed_of,
    steps_per_epoch,
)
from ser_ray.training.metrics import Scores, count_confusion, log_losses, selected_epoch
from ser_ray.training.model import Pretrained, ResNet18, supports_bfloat16, to_channels_last
from ser_ray.training.optim import one_cycle, sam_perturbation, update_ema
from ser_ray.training.scoring import predict_clips
from ser_ray.training.streaming import Fetch, stream_fold
from ser_ray.training.world import World

NETWORK, OPTIMISER = "network.", "optimiser."
"""How the names of a checkpoint's tensors begin: the network's own weights, and its moments."""
PREEMPTION_CHECK_STEPS = 32
"""Steps between two preemption checks: each one waits for all workers."""


@dataclass(frozen=True, slots=True)
class EpochReport:
    """What is known after an epoch, equal on every worker.

    Args:
        timestamp_ms: when the epoch ended, in milliseconds since 1970.
        row: plain numbers, by the names they are logged under.
        learning_rates: learning rate of every step of the epoch.
        confusion: counts of the validation clips [labels, labels], row = true label.
        is_selected: of the epochs so far, this one's weights are kept (`TrainConfig.keep`).
    """

    timestamp_ms: int
    row: dict[str, float]
    learning_rates: list[float]
    confusion: list[list[int]]
    is_selected: bool


MakeSnapshot = Callable[[], Snapshot]
"""Copies the current state of the training, for a checkpoint. Call it before the report returns."""
Report = Callable[[EpochReport | None, MakeSnapshot], None]
"""Called on every worker after every epoch, and with None after a positive `preemption_check`."""


def fit(
    config: TrainConfig,
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
        config: the recipe.
        shards: the shard set to train on.
        pretrained: weights to start from (`ser_ray.training.model.read_pretrained`).
        report: called after every epoch with its scores and a function that makes a snapshot.
        resume: directory of a checkpoint of the same training, to resume from.
        device: where to train; the CPU by default.
        preemption_check: called on every worker each PREEMPTION_CHECK_STEPS steps; where it returns
            True, on all workers alike, a checkpoint is reported in mid-epoch.
        stream: how to read training clips that do not stay in memory; `map` reads them in this
            process. Without it, all clips are resident.

    Raises:
        ConfigError: the recipe does not fit the shards or the number of workers.
        MismatchError: `resume` is another training's.
        DivergedError: a loss or a weight was not finite; names the epoch.
    """
    world, device = World.current(), device or torch.device("cpu")
    before = read_card(resume) if resume is not None else None
    data: FoldData[Source]
    if stream is None:
        data = load_fold(shards, config, device)
    else:
        known = before.normalisation if before is not None else None
        data = stream_fold(shards, config, device, world, stream, known)
    require_workers_fit(config, len(data.train), world.size)
    card = make_card(config, shards, data, pretrained, "resident" if stream is None else "stream")
    trainer = Trainer(config, data, pretrained, shards.card.features, device, world)
    if resume is not None and before is not None:
        card.require_same(before, str(resume))
        trainer.restore(Snapshot.read(resume))

    def make_snapshot() -> Snapshot:
        return trainer.snapshot(card)

    while not trainer.finished:
        for _ in trainer.begin_epoch():
            trainer.train_step()
            if (
                preemption_check is not None
                and trainer.steps_taken % PREEMPTION_CHECK_STEPS == 0
                and preemption_check()
            ):
                trainer.reduce_counts()
                report(None, make_snapshot)
        report(trainer.finish_epoch(), make_snapshot)


class Trainer:
    """The state of a training, and the steps that change it: `train_step`, `validate`, ..."""

    def __init__(
        self,
        config: TrainConfig,
        data: FoldData[Source],
        pretrained: Pretrained,
        features: FeatureConfig,
        device: torch.device,
        world: World,
    ) -> None:
        self.config, self.data, self.device, self.world = config, data, device, world
        num_rows = len(data.train)
        self.batch_size = min(config.batch_size, num_rows)
        self.steps_per_epoch = steps_per_epoch(num_rows, self.batch_size)
        torch.manual_seed(seed_of(config.seed))
        network = ResNet18(len(data.labels))
        network.load_state_dict(network.state_dict() | pretrained.state)
        self.network = to_channels_last(network, device)
        self.parallel = _data_parallel(network) if world.size > 1 else network
        self.average = copy.deepcopy(network) if config.ema_decay else None
        self.optimiser = AdamW(
            network.parameters(), lr=config.lr_min, weight_decay=config.weight_decay, fused=True
        )
        self.total_steps = config.epochs * self.steps_per_epoch
        self.schedule = one_cycle(self.optimiser, config, self.total_steps)
        response = gain_response(config.feature, features.num_mels, data.normalisation, device)
        self.augment = Augment(config, features, len(data.labels), response)
        self.autocast = supports_bfloat16(device, len(response), config.crop_frames)
        self.losses = torch.zeros(self.steps_per_epoch, device=device)
        self.num_correct = torch.zeros((), device=device)
        self.learning_rates: list[float] = []
        """Learning rate of every step so far."""
        self.epoch, self.step = 0, 0
        """Epochs done, and steps done of the next."""
        self.batches = data.train.batches(config, world, 0, 0)
        self.validation_probabilities = torch.zeros(0, len(data.labels), dtype=torch.float64)
        """Of the last epoch's validation [clips, labels]; empty before the first one."""
        self.selected: dict[str, float] = {}
        self.selected_confusion: list[list[int]] = []
        """Row and validation counts of the selected epoch, so far."""
        self.history: list[dict[str, float]] = []
        self.times_ms: list[int] = []
        """Rows of all epochs so far, and when each ended."""

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or the last `patience` of them did not improve."""
        patience = self.config.patience
        stale = bool(self.selected) and self.epoch - self.selected["epoch"] >= patience > 0
        return self.epoch >= self.config.epochs or stale

    @property
    def steps_taken(self) -> int:
        """Steps since the beginning of the training."""
        return self.epoch * self.steps_per_epoch + self.step

    def begin_epoch(self) -> range:
        """Begin or resume an epoch, and return the steps that remain of it."""
        self.first_step, self.began = self.step, time.perf_counter()
        self.network.train()
        return range(self.step, self.steps_per_epoch)

    def train_step(self) -> None:
        """Train on the next batch, and move the learning rate one step on."""
        self.learning_rates.append(float(self.schedule.get_last_lr()[0]))
        self.losses[self.step], num_correct = self.update_weights(next(self.batches))
        self.num_correct += num_correct
        self.step += 1
        if self.steps_taken < self.total_steps:
            self.schedule.step()

    def update_weights(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Take an optimiser step on a batch.

        Returns:
            This worker's share of the batch's mean loss, and how many of its clips were correct.
        """
        torch.manual_seed(batch.seed)
        features, targets = self.augment(batch.clips, batch.rows)
        features = features[batch.rank_slice].contiguous(memory_format=torch.channels_last)
        targets = targets[batch.rank_slice]
        share, num_correct = self._forward_backward(features, targets)
        if self.config.sam_rho:
            with sam_perturbation(self.network, self.config.sam_rho):
                self._forward_backward(features, targets)
        self.optimiser.step()
        if self.average is not None:
            decay = self.config.ema_decay if self.steps_taken else 0.0  # the first step starts it
            update_ema(self.average, self.network, decay)
        return share, num_correct

    def validate(self) -> Scores:
        """Score every validation clip once. Each worker scores its share; all get the sums."""
        self._share_batch_norm()
        clips = self.data.validation
        mine = np.arange(len(clips))[self.world.rank_slice]
        num_labels = len(self.data.labels)
        probabilities = predict_clips(self._evaluated(), clips, mine, self.config, num_labels)
        truth = clips.labels[torch.from_numpy(mine).to(self.device)].cpu().numpy()
        counts = torch.from_numpy(
            count_confusion(truth, probabilities.argmax(axis=1), num_labels)
        ).to(self.device)
        loss = torch.tensor(log_losses(truth, probabilities).sum(), device=self.device)
        self.world.all_reduce_sum(counts), self.world.all_reduce_sum(loss)
        of_all = torch.zeros(len(clips), num_labels, dtype=torch.float64, device=self.device)
        of_all[self.world.rank_slice] = torch.from_numpy(probabilities).to(self.device)
        self.validation_probabilities = self.world.all_reduce_sum(of_all)
        return Scores(counts.cpu().numpy(), float(loss) / len(clips))

    def finish_epoch(self) -> EpochReport:
        """Validate, record the epoch, and make ready for the next.

        Raises:
            DivergedError: the loss of one of its steps, or a weight after them, is not finite.
        """
        self.reduce_counts(everywhere=True)
        self._require_finite()
        trained = time.perf_counter()
        scores = self.validate()
        ended = time.perf_counter()
        steps_here = self.step - self.first_step
        row = {
            "epoch": float(self.epoch + 1),
            "train_loss": float(self.losses.mean()),
            "train_wa": float(self.num_correct) / (self.steps_per_epoch * self.batch_size),
            **{f"val_{name}": value for name, value in scores.to_dict().items()},
            "lr": self.learning_rates[-1],
            "workers": float(self.world.size),
            "bfloat16": float(self.autocast),
            "epoch_seconds": ended - self.began,
            "clips_per_second": steps_here * self.batch_size / (trained - self.began),
        }
        self.history.append(row)
        is_selected = selected_epoch(self.history, self.config.keep) == self.epoch
        confusion = scores.confusion.tolist()
        if is_selected:
            self.selected, self.selected_confusion = row, confusion
        self.times_ms.append(time.time_ns() // 1_000_000)
        learning_rates = self.learning_rates[-self.steps_per_epoch :]
        report = EpochReport(self.times_ms[-1], row, learning_rates, confusion, is_selected)
        self.epoch, self.step = self.epoch + 1, 0
        self.losses.zero_(), self.num_correct.zero_()
        return report

    def reduce_counts(self, *, everywhere: bool = False) -> None:
        """Sum the epoch's losses and correct clips over the workers, on the first one or on all."""
        self.world.all_reduce_sum(self.losses), self.world.all_reduce_sum(self.num_correct)
        if self.world.rank > 0 and not everywhere:
            self.losses.zero_(), self.num_correct.zero_()

    def snapshot(self, card: CheckpointCard) -> Snapshot:
        """Copy everything a checkpoint holds. (The order of the clips follows from the seed.)"""
        optimiser = self.optimiser.state_dict()
        state = {
            "losses": self.losses,
            "num_correct": self.num_correct,
            VALIDATION: self.validation_probabilities,
        } | {
            f"{OPTIMISER}{index}.{name}": value
            for index, values in optimiser["state"].items()
            for name, value in values.items()
        }
        if self.average is not None:
            network = self.network.state_dict()
            state |= {f"{NETWORK}{name}": value for name, value in network.items()}
        progress = {
            "param_groups": optimiser["param_groups"],
            "schedule": self.schedule.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "learning_rates": self.learning_rates,
            "selected": self.selected,
            "selected_confusion": self.selected_confusion,
            "history": self.history,
            "times_ms": self.times_ms,
        }
        # The copies are made here because in the thread that writes them they would start a second
        # team of CPU threads; with more of these than CPUs, each sleeps at every barrier.
        weights, state = (
            {key: value.clone(memory_format=torch.contiguous_format) for key, value in part.items()}
            for part in (self._evaluated().state_dict(), state)
        )
        return Snapshot(card, weights, state, copy.deepcopy(progress))

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from what a `snapshot` held.

        Raises:
            MismatchError: it is another network's.
        """
        state, progress = snapshot.state, snapshot.progress
        try:
            self._evaluated().load_state_dict(snapshot.weights)
            if self.average is not None:
                self.network.load_state_dict(_under(NETWORK, state))
            self._restore_optimiser(_under(OPTIMISER, state), progress["param_groups"])
            self.schedule.load_state_dict(progress["schedule"])
            if self.world.rank == 0:
                self.losses.copy_(state["losses"]), self.num_correct.copy_(state["num_correct"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise MismatchError(
                f"the checkpoint holds another network's state ({str(error)[:200]}): give another "
                "--name to start afresh"
            ) from error
        self.epoch, self.step = progress["epoch"], progress["step"]
        self.learning_rates, self.history = progress["learning_rates"], progress["history"]
        self.times_ms = progress["times_ms"]
        self.selected, self.selected_confusion = (
            progress["selected"],
            progress["selected_confusion"],
        )
        self.batches = self.data.train.batches(self.config, self.world, self.epoch, self.step)

    def _restore_optimiser(self, state: dict[str, Tensor], groups: list[dict[str, Any]]) -> None:
        moments: dict[int, dict[str, Tensor]] = defaultdict(dict)
        weights = list(self.network.parameters())
        for key, value in state.items():
            index, name = key.split(".")
            # Fused AdamW takes a moment to lie in memory as its weight does. What is read lies in
            # the mapped file, which must not be held.
            like = value if name == "step" else weights[int(index)]
            moments[int(index)][name] = torch.empty_like(like, device="cpu").copy_(value)
        self.optimiser.load_state_dict({"state": moments, "param_groups": groups})

    def _forward_backward(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradient of a batch's loss; returns what `update_weights` returns."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            logits = self.parallel(features)
            total = F.cross_entropy(
                logits, targets, reduction="sum", label_smoothing=self.config.label_smoothing
            )
        share = total / self.batch_size
        self.optimiser.zero_grad(set_to_none=True)
        # DDP averages over workers; the batch's gradient is the sum of their shares.
        (share * self.world.size).backward()
        num_correct = (logits.argmax(dim=1) == targets.argmax(dim=1)).sum()
        return share.detach(), num_correct

    def _require_finite(self) -> None:
        bad = torch.nonzero(~torch.isfinite(self.losses))
        if len(bad):
            step = int(bad[0])
            rate = self.learning_rates[self.epoch * self.steps_per_epoch + step]
            raise DivergedError(
                f"the loss of step {step} of epoch {self.epoch + 1} is not finite (learning rate "
                f"{rate:.2g}): lower --lr-max, or look for broken clips in the shards"
            )
        names, values = zip(*self.network.named_parameters(), strict=True)
        finite = torch.stack([value.isfinite().all() for value in values]).tolist()
        if not all(finite):
            raise DivergedError(
                f"{names[finite.index(False)]} is not finite after epoch {self.epoch + 1}, though "
                "the loss is: lower --lr-max, or train on another machine: this one's arithmetic "
                "may be at fault"
            )

    def _evaluated(self) -> nn.Module:
        return self.network if self.average is None else self.average

    def _share_batch_norm(self) -> None:
        """Give every worker the mean of all workers' batch-norm statistics."""
        networks = [self.network] if self.average is None else [self.network, self.average]
        for name, value in chain.from_iterable(network.named_buffers() for network in networks):
            if self.world.size > 1 and not name.endswith("num_batches_tracked"):
                dist.all_reduce(value)
                value /= self.world.size


def make_card(
    config: TrainConfig,
    shards: ShardSet,
    data: FoldData[Source],
    pretrained: Pretrained,
    ingest: Literal["resident", "stream"],
) -> CheckpointCard:
    """Make the card of every checkpoint of this training."""
    return CheckpointCard(
        labels=data.labels,
        config=config,
        features=shards.card.features,
        normalisation=data.normalisation,
        corpus=shards.card.corpus,
        shards_fingerprint=shards.card.fingerprint,
        split=describe_split(data.split),
        initial_weights=pretrained.origin,
        ingest=ingest,
    )


def require_workers_fit(config: TrainConfig, num_clips: int, workers: int) -> None:
    """Refuse more workers than there are clips in a batch or in the training set.

    Raises:
        ConfigError: there are too many workers.
    """
    if config.batch_size < workers:
        raise ConfigError(
            f"batch_size is {config.batch_size} over {workers} workers: it is the batch of all "
            "workers together, so it must be at least their number"
        )
    if num_clips < workers:
        raise ConfigError(f"{num_clips} training clips are too few for {workers} workers")


def _under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Select the tensors whose names begin with a prefix, and take it off."""
    names = [name for name in state if name.startswith(prefix)]
    return {name.removeprefix(prefix): state[name] for name in names}


def _data_parallel(network: nn.Module) -> nn.Module:
    # Batch-norm statistics are averaged once an epoch instead of sent from rank 0 in every step.
    return nn.parallel.DistributedDataParallel(
        network, broadcast_buffers=False, gradient_as_bucket_view=True
    )
