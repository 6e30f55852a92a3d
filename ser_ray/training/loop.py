"""The training loop in plain torch: tensors in, checkpoints and scores out.

It knows nothing of Ray. Alone it trains in one process; where `torch.distributed` is initialised,
by Ray Train or torchrun, it is one worker of many. Batches, learning rates and augmentation are
functions of (seed, epoch, step), not of the number of workers: each worker draws the whole batch
and takes its stride, so a run may change its number of workers and stay the same run.

Nothing in a step waits for the device; counts and losses leave it once an epoch.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ser_ray.errors import ConfigError, DivergedError
from ser_ray.shards.read import ShardSet
from ser_ray.training.augment import Augment, gain_response
from ser_ray.training.checkpoint import CheckpointCard, read_card, read_state, write_checkpoint
from ser_ray.training.config import TrainConfig
from ser_ray.training.data import (
    Clips,
    FoldData,
    describe,
    epoch_order,
    load_fold,
    seed_of,
    steps_per_epoch,
    window_batches,
)
from ser_ray.training.metrics import Scores, count_confusion
from ser_ray.training.model import Pretrained, build_network


@dataclass(frozen=True, slots=True)
class World:
    """This worker among the workers of a training."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "World":
        """The initialised process group's, or one worker alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over all workers, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values


@dataclass(frozen=True, slots=True)
class EpochReport:
    """What is known after an epoch, equal on every worker.

    `row` holds plain numbers by the names they are logged under; `lr` the epoch's learning rates,
    one a step; `confusion` the validation counts.
    """

    row: dict[str, float]
    lr: list[float]
    confusion: list[list[int]]
    is_best: bool


Save = Callable[[Path], None]
"""Writes the checkpoint of the epoch just reported into a directory."""
Report = Callable[[EpochReport, Save], None]
"""Called on every worker after every epoch."""


def fit(
    config: TrainConfig,
    shards: ShardSet,
    pretrained: Pretrained,
    report: Report,
    *,
    resume: Path | None = None,
    device: torch.device | None = None,
) -> None:
    """Train one fold, from its beginning or from a checkpoint.

    Args:
        config: the recipe.
        shards: the shard set to train on.
        pretrained: weights to start from (`ser_ray.training.model.read_pretrained`).
        report: called after every epoch with the scores and the means to save a checkpoint.
        resume: checkpoint directory of the same training to go on from.
        device: where to train; the CPU by default.

    Raises:
        ConfigError: the recipe does not fit the shards or the number of workers.
        CheckpointError: `resume` is another training's.
        DivergedError: a loss was not finite; names the epoch and step.
    """
    world, device = World.current(), device or torch.device("cpu")
    data = load_fold(shards, config, device)
    _require_fit(config, data, world)
    card = make_card(config, shards, data, pretrained)
    run = Training(config, data, pretrained, shards.card.features.num_mels, device, world)
    if resume is not None:
        card.require_same(read_card(resume), str(resume))
        run.load_state(read_state(resume))
    while not run.finished:
        started = time.perf_counter()
        train_loss, train_wa, lr = run.train_epoch()
        trained = time.perf_counter()
        scores = run.validate()
        seconds = time.perf_counter() - started
        row = {
            "train_loss": train_loss,
            "train_wa": train_wa,
            **{f"val_{name}": value for name, value in scores.to_dict().items()},
            "lr": lr[-1],
            "epoch_seconds": seconds,
            "clips_per_second": len(lr) * run.batch_size / (trained - started),
        }
        is_best = run.close_epoch(row)
        report(
            EpochReport(row, lr, scores.confusion.tolist(), is_best),
            lambda directory: write_checkpoint(directory, card, run.weights(), run.state()),
        )


class Training:
    """The state of a training between two steps, and the two halves of an epoch."""

    def __init__(
        self,
        config: TrainConfig,
        data: FoldData,
        pretrained: Pretrained,
        num_mels: int,
        device: torch.device,
        world: World,
    ) -> None:
        self.config, self.data, self.device, self.world = config, data, device, world
        num_rows = len(data.train)
        self.batch_size = min(config.batch_size, num_rows)
        self.steps_per_epoch = steps_per_epoch(num_rows, self.batch_size)
        torch.manual_seed(seed_of(config.seed))
        network = build_network(len(data.labels))
        network.load_state_dict(network.state_dict() | pretrained.state)
        self.network = network.to(device, memory_format=torch.channels_last)
        self.parallel = _data_parallel(network) if world.size > 1 else network
        self.average = _averaged(network, config.average_decay) if config.average_decay else None
        self.optimiser = AdamW(
            network.parameters(), lr=config.lr_min, weight_decay=config.weight_decay, fused=True
        )
        self.total_steps = config.epochs * self.steps_per_epoch
        self.schedule = OneCycleLR(
            self.optimiser,
            max_lr=config.lr_max,
            total_steps=max(self.total_steps, 2),
            pct_start=config.lr_peak_at,
            div_factor=config.lr_max / config.lr_min,
            final_div_factor=config.lr_final_division,
        )
        response = gain_response(config.feature, num_mels, data.normalisation, device)
        self.augment = Augment(config.augment, config.crop_frames, len(data.labels), response)
        self.autocast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        self.epoch = 0
        """Epochs done."""
        self.best: dict[str, float] = {}
        """Row of the best epoch so far."""
        self.history: list[dict[str, float]] = []
        """Rows of all epochs so far."""

    @property
    def finished(self) -> bool:
        """All epochs done, or no better validation UA for `patience` of them."""
        patience = self.config.patience
        stale = bool(self.best) and self.epoch - self.best["epoch"] >= patience > 0
        return self.epoch >= self.config.epochs or stale

    def train_epoch(self) -> tuple[float, float, list[float]]:
        """Take the epoch's steps.

        Returns:
            Mean loss and accuracy on the augmented clips, and the learning rate of every step.
        """
        seed, epoch = self.config.seed, self.epoch
        order = epoch_order(seed, epoch, self.data.train.labels, balanced=self.config.balanced)
        order = order.to(self.device)
        losses = torch.zeros(self.steps_per_epoch, device=self.device)
        hits = torch.zeros((), device=self.device)
        rates = []
        self.network.train()
        for step in range(self.steps_per_epoch):
            torch.manual_seed(seed_of(seed, epoch, step))
            rows = order[step * self.batch_size : (step + 1) * self.batch_size]
            losses[step], step_hits = self._step(rows)
            hits += step_hits
            rates.append(float(self.schedule.get_last_lr()[0]))
            if epoch * self.steps_per_epoch + step + 1 < self.total_steps:
                self.schedule.step()
        self.world.sum(losses), self.world.sum(hits)
        bad = torch.nonzero(~torch.isfinite(losses))
        if len(bad):
            raise DivergedError(
                f"the loss of step {int(bad[0])} of epoch {epoch + 1} is not finite (learning rate "
                f"{rates[int(bad[0])]:.2g}): lower --lr-max, or look for broken clips in the shards"
            )
        clips = self.steps_per_epoch * self.batch_size
        return float(losses.mean()), float(hits) / clips, rates

    def _step(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step; returns this worker's share of the batch's mean loss, and its hits."""
        batch, targets = self.augment(self.data.train, rows)
        mine = slice(self.world.rank, None, self.world.size)
        batch = batch[mine].contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            logits = self.parallel(batch)
            total = F.cross_entropy(
                logits, targets[mine], reduction="sum", label_smoothing=self.config.label_smoothing
            )
        share = total / len(rows)
        self.optimiser.zero_grad(set_to_none=True)
        # DDP averages over workers; the batch's gradient is the sum of their shares.
        (share * self.world.size).backward()
        self.optimiser.step()
        if self.average is not None:
            self.average.update_parameters(self.network)
        hits = (logits.argmax(dim=1) == targets[mine].argmax(dim=1)).sum()
        return share.detach(), hits

    def validate(self) -> Scores:
        """Score the validation clips, each once, over all workers."""
        self._share_batch_norm()
        clips = self.data.validation
        mine = np.arange(self.world.rank, len(clips), self.world.size)
        num_labels = len(self.data.labels)
        probabilities = predict_clips(
            self._evaluated(), clips, mine, self.config, num_labels, autocast=self.autocast
        )
        truth = clips.labels[torch.from_numpy(mine).to(self.device)].cpu().numpy()
        counts = torch.from_numpy(
            count_confusion(truth, probabilities.argmax(axis=1), num_labels)
        ).to(self.device)
        likelihood = probabilities[np.arange(len(truth)), truth]
        loss = torch.tensor(-np.log(np.maximum(likelihood, 1e-12)).sum(), device=self.device)
        self.world.sum(counts), self.world.sum(loss)
        return Scores(counts.cpu().numpy(), float(loss) / len(clips))

    def close_epoch(self, row: dict[str, float]) -> bool:
        """Count the epoch as done; says whether it is the best by validation UA, then loss."""
        self.epoch += 1
        row["epoch"] = float(self.epoch)
        self.history.append(row)
        rank = (row["val_ua"], -row["val_loss"])
        is_best = not self.best or rank > (self.best["val_ua"], -self.best["val_loss"])
        if is_best:
            self.best = row
        return is_best

    def weights(self) -> dict[str, Tensor]:
        """The weights that were validated, on the CPU."""
        return {key: value.cpu() for key, value in self._evaluated().state_dict().items()}

    def state(self) -> dict[str, Any]:
        """What going on needs beyond `weights`; the order of clips follows from seed and epoch."""
        return {
            # Without averaging the weights beside this are the network's own.
            "network": self.network.state_dict() if self.average is not None else None,
            "average": self.average.state_dict() if self.average is not None else None,
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "epoch": self.epoch,
            "best": self.best,
            "history": self.history,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.network.load_state_dict(state["network"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        self.epoch, self.best = state["epoch"], state["best"]
        self.history = state["history"]

    def _evaluated(self) -> nn.Module:
        return self.network if self.average is None else self.average.module

    def _share_batch_norm(self) -> None:
        """Give every worker the mean of all workers' batch-norm statistics."""
        for name, value in self.network.named_buffers():
            if self.world.size > 1 and not name.endswith("num_batches_tracked"):
                dist.all_reduce(value)
                value /= self.world.size


@torch.inference_mode()
def predict_clips(
    network: nn.Module,
    clips: Clips,
    rows: np.ndarray,
    config: TrainConfig,
    num_labels: int,
    *,
    autocast: bool = False,
) -> np.ndarray:
    """Probabilities of some clips: the mean over the windows that cover each.

    Args:
        rows: indices of the clips to score [scored].

    Returns:
        float64 [scored, labels], rows summing to 1.
    """
    was_training = network.training
    network.eval()
    device = clips.labels.device
    num_frames = clips.num_frames.cpu().numpy()
    position = np.zeros(len(clips), dtype=np.int64)
    position[rows] = np.arange(len(rows))
    sums = torch.zeros(len(rows), num_labels, dtype=torch.float64, device=device)
    counts = np.zeros(len(rows))
    batch_size = max(config.batch_size, 32)
    for clip, start in window_batches(num_frames, rows, config.crop_frames, batch_size):
        batch, _ = clips.take(
            torch.from_numpy(clip).to(device),
            torch.from_numpy(start).to(device),
            config.crop_frames,
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            logits = network(batch.contiguous(memory_format=torch.channels_last))
        where = torch.from_numpy(position[clip]).to(device)
        sums.index_add_(0, where, logits.double().softmax(dim=1))
        np.add.at(counts, position[clip], 1)
    network.train(was_training)
    return sums.cpu().numpy() / counts[:, None]


def make_card(
    config: TrainConfig, shards: ShardSet, data: FoldData, pretrained: Pretrained
) -> CheckpointCard:
    """The card of every checkpoint of this training."""
    return CheckpointCard(
        labels=data.labels,
        config=config,
        features=shards.card.features,
        normalisation=data.normalisation,
        corpus=shards.card.corpus,
        shards_fingerprint=shards.card.fingerprint,
        split=describe(data.split),
        initial_weights=pretrained.origin,
    )


def _require_fit(config: TrainConfig, data: FoldData, world: World) -> None:
    if config.batch_size < world.size:
        raise ConfigError(
            f"batch_size is {config.batch_size} over {world.size} workers: it is the batch of all "
            "workers together, so it must be at least their number"
        )
    if len(data.train) < world.size:
        raise ConfigError(f"{len(data.train)} training clips are too few for {world.size} workers")


def _data_parallel(network: nn.Module) -> nn.Module:
    # Batch-norm statistics are averaged once an epoch instead of sent from rank 0 in every step.
    return nn.parallel.DistributedDataParallel(
        network, broadcast_buffers=False, gradient_as_bucket_view=True
    )


def _averaged(network: nn.Module, decay: float) -> AveragedModel:
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
