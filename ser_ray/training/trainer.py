"""The state of a training: the steps that change it, its scores, and its snapshots."""

import time
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from ser_ray.errors import DivergedError, MismatchError
from ser_ray.features.config import KINDS, FeatureConfig
from ser_ray.training.augment import Augment
from ser_ray.training.calibration import fit_temperature
from ser_ray.training.checkpoint import VALIDATION, Progress, Snapshot
from ser_ray.training.checkpoint_card import CheckpointCard
from ser_ray.training.data import Batch, FoldData, Source, steps_per_epoch
from ser_ray.training.metrics import Scores, count_confusion, log_losses, selected_epoch
from ser_ray.training.model import EncoderHead, ResNet18, supports_bfloat16
from ser_ray.training.optim import (
    optimiser_tensors,
    restore_optimiser,
    restore_schedule,
)
from ser_ray.training.recipe import TrainConfig
from ser_ray.training.scoring import predict_clips
from ser_ray.training.world import World


@dataclass(frozen=True, slots=True)
class EpochReport:
    """Results of an epoch. The losses and scores are the same on every worker.

    Args:
        timestamp_ms: when the epoch ended, in milliseconds since 1970.
        row: the epoch's metrics, by the names they are logged under.
        learning_rates: learning rate of every step of the epoch.
        confusion: counts of the validation clips [labels, labels], row = true label; empty without
            validation clips.
        is_selected: whether this epoch is the selected one so far (`TrainConfig.keep`).
        progress: all epochs so far. The training changes it after the report.
    """

    timestamp_ms: int
    row: dict[str, float]
    learning_rates: list[float]
    confusion: list[list[int]]
    is_selected: bool
    progress: Progress


class Trainer:
    """The state of a training, and the methods that advance it."""

    def __init__(
        self,
        config: TrainConfig,
        data: FoldData[Source],
        features: FeatureConfig,
        network: ResNet18 | EncoderHead,
        optimiser: Optimizer,
        schedule: OneCycleLR,
        world: World,
    ) -> None:
        device = next(network.parameters()).device
        self.config, self.data, self.device, self.world = config, data, device, world
        self.network, self.optimiser, self.schedule = network, optimiser, schedule
        self.parallel = _data_parallel(network) if world.size > 1 else network
        self.augment = Augment(config, features, len(data.labels), data.normalisation, device)
        num_bins = len(data.normalisation.std)
        self.autocast = config.feature in KINDS and supports_bfloat16(
            device, num_bins, config.window_frames
        )
        self.batch_size = min(config.batch_size, len(data.train))
        self.steps_per_epoch = steps_per_epoch(len(data.train), self.batch_size)
        self.losses = torch.zeros(self.steps_per_epoch, device=device)
        self.num_correct = torch.zeros((), device=device)
        self.validation_probabilities = torch.zeros(0, len(data.labels), dtype=torch.float64)
        """Probabilities of the last validation [clips, labels]; empty until there is one."""
        self.progress = Progress()
        self.batches = data.train.batches(config, world, epoch=0, step=0)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.progress.epoch >= self.config.epochs

    @property
    def steps_taken(self) -> int:
        """Completed steps since the beginning of the training."""
        return self.progress.epoch * self.steps_per_epoch + self.progress.step

    def begin_epoch(self) -> range:
        """Begin or resume an epoch, and return its remaining steps."""
        self.first_step, self.began = self.progress.step, time.perf_counter()
        self.network.train()
        return range(self.first_step, self.steps_per_epoch)

    def train_step(self) -> None:
        """Train on the next batch, and advance the learning rate."""
        self.progress.learning_rates.append(float(self.schedule.get_last_lr()[0]))
        loss, num_correct = self.update_weights(next(self.batches))
        self.losses[self.progress.step] = loss
        self.num_correct += num_correct
        self.progress.step += 1
        if self.steps_taken < self.config.epochs * self.steps_per_epoch:
            self.schedule.step()

    def update_weights(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Make an optimiser step on a batch.

        Returns:
            This worker's share of the batch's mean loss, and how many of the clips in this worker's
            share were predicted correctly.
        """
        torch.manual_seed(batch.seed)
        features, targets = self.augment(batch.clips, batch.rows)
        features = features[batch.rank_slice].contiguous(memory_format=torch.channels_last)
        targets = targets[batch.rank_slice]
        loss, num_correct = self._forward_backward(features, targets)
        self.optimiser.step()
        return loss, num_correct

    def finish_steps(self) -> None:
        """Sum the epoch's losses and counts over the workers.

        Raises:
            DivergedError: a loss of this epoch or a weight is not finite.
        """
        self.reduce_counts(on_all_workers=True)
        self._require_finite()
        self.training_seconds = time.perf_counter() - self.began

    def validate(self) -> Scores | None:
        """Score every validation clip once. Each worker scores its share; all get the total.

        Returns:
            The scores, or None if there are no validation clips.
        """
        self._average_batch_norm()
        clips, num_labels = self.data.validation, len(self.data.labels)
        if not len(clips):
            return None
        truth_of_all = clips.truth
        rows = np.arange(len(truth_of_all))[self.world.rank_slice]
        probabilities = predict_clips(self.network, clips, rows, self.config, num_labels)
        truth = truth_of_all[rows]
        counts = torch.from_numpy(
            count_confusion(truth, probabilities.argmax(axis=1), num_labels)
        ).to(self.device)
        loss = torch.tensor(log_losses(truth, probabilities).sum(), device=self.device)
        self.world.all_reduce_sum(counts), self.world.all_reduce_sum(loss)
        shape = len(truth_of_all), num_labels
        of_all = torch.zeros(shape, dtype=torch.float64, device=self.device)
        of_all[self.world.rank_slice] = torch.from_numpy(probabilities).to(self.device)
        self.validation_probabilities = self.world.all_reduce_sum(of_all)
        return Scores(counts.cpu().numpy(), float(loss) / len(truth_of_all))

    def finish_epoch(self, scores: Scores | None) -> EpochReport:
        """Record the epoch with its validation scores, if it has any, and prepare the next."""
        progress, num_steps = self.progress, self.progress.step - self.first_step
        validation = {} if scores is None else scores.to_dict()
        row = {
            "epoch": float(progress.epoch + 1),
            "train/loss": float(self.losses.mean()),
            "train/wa": float(self.num_correct) / (self.steps_per_epoch * self.batch_size),
            **{f"val/{name}": value for name, value in validation.items()},
            "lr": progress.learning_rates[-1],
            "speed/workers": float(self.world.size),
            "bfloat16": float(self.autocast),
            "speed/epoch_seconds": time.perf_counter() - self.began,
            "speed/clips_per_second": num_steps * self.batch_size / self.training_seconds,
        }
        progress.history.append(row)
        progress.times_ms.append(time.time_ns() // 1_000_000)
        is_selected = selected_epoch(progress.history, self.config.keep) == progress.epoch
        confusion = [] if scores is None else scores.confusion.tolist()
        if is_selected:
            progress.selected, progress.selected_confusion = row, confusion
        learning_rates = progress.learning_rates[-self.steps_per_epoch :]
        progress.epoch, progress.step = progress.epoch + 1, 0
        self.losses.zero_(), self.num_correct.zero_()
        return EpochReport(
            progress.times_ms[-1], row, learning_rates, confusion, is_selected, progress
        )

    def reduce_counts(self, *, on_all_workers: bool = False) -> None:
        """Sum the epoch's losses and counts over the workers.

        The first worker always gets the sums. The others get them if `on_all_workers` is set.
        Otherwise they count from 0 again, so that a later sum counts each clip once.
        """
        self.world.all_reduce_sum(self.losses), self.world.all_reduce_sum(self.num_correct)
        if self.world.rank > 0 and not on_all_workers:
            self.losses.zero_(), self.num_correct.zero_()

    def snapshot(self, card: CheckpointCard) -> Snapshot:
        """Copy everything that a checkpoint holds; the card gets the temperature of its weights."""
        temperature = self.config.temperature
        if len(self.data.validation):
            probabilities = self.validation_probabilities.cpu().numpy()
            truth = self.data.validation.truth[: len(probabilities)]
            temperature = fit_temperature(truth, probabilities)
        card = replace(card, temperature=temperature)
        state = {
            "losses": self.losses,
            "num_correct": self.num_correct,
            VALIDATION: self.validation_probabilities,
            **optimiser_tensors(self.optimiser),
        }
        # If the thread that writes the tensors copied them, torch would start a second pool of CPU
        # threads. With more threads than CPUs, each thread sleeps at every barrier.
        weights, state = (
            {key: value.clone(memory_format=torch.contiguous_format) for key, value in part.items()}
            for part in (self.network.state_dict(), state)
        )
        return Snapshot(card, weights, state, asdict(self.progress))

    def restore(self, snapshot: Snapshot) -> None:
        """Continue from a snapshot.

        Raises:
            MismatchError: the snapshot is of another network.
        """
        state, progress = snapshot.state, Progress.from_dict(snapshot.progress)
        num_steps = len(progress.learning_rates)
        if num_steps != progress.epoch * self.steps_per_epoch + progress.step:
            raise MismatchError(
                f"the checkpoint was written after {num_steps} steps, which are not "
                f"{progress.epoch} epochs of this training: give another --name to start afresh"
            )
        try:
            self.network.load_state_dict(snapshot.weights)
            restore_optimiser(self.optimiser, state)
            if self.world.rank == 0:
                self.losses.copy_(state["losses"]), self.num_correct.copy_(state["num_correct"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise MismatchError(
                f"the checkpoint holds the state of another network ({str(error)[:200]}): give "
                "another --name to start afresh"
            ) from error
        total = self.config.epochs * self.steps_per_epoch
        restore_schedule(self.schedule, min(num_steps, total - 1))
        self.progress = progress
        self.batches = self.data.train.batches(
            self.config, self.world, self.progress.epoch, self.progress.step
        )

    def _forward_backward(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradient of a batch's loss, and return what `update_weights` returns."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            logits = self.parallel(features)
            total = F.cross_entropy(
                logits, targets, reduction="sum", label_smoothing=self.config.label_smoothing
            )
        loss = total / self.batch_size
        self.optimiser.zero_grad(set_to_none=True)
        # DDP averages the workers' gradients, but the batch's gradient is their sum.
        (loss * self.world.size).backward()
        num_correct = (logits.argmax(dim=1) == targets.argmax(dim=1)).sum()
        return loss.detach(), num_correct

    def _require_finite(self) -> None:
        epoch = self.progress.epoch
        bad = torch.nonzero(~torch.isfinite(self.losses))
        if len(bad):
            step = int(bad[0])
            rate = self.progress.learning_rates[epoch * self.steps_per_epoch + step]
            raise DivergedError(
                f"the loss of step {step} of epoch {epoch + 1} is not finite (learning rate "
                f"{rate:.2g}): lower --lr-max, or look for broken clips in the shards"
            )
        names, values = zip(*self.network.named_parameters(), strict=True)
        finite = torch.stack([value.isfinite().all() for value in values]).tolist()
        if not all(finite):
            raise DivergedError(
                f"{names[finite.index(False)]} is not finite after epoch {epoch + 1}, though "
                "the losses are finite: lower --lr-max, or train on another machine, because this "
                "one may make errors in its arithmetic"
            )

    def _average_batch_norm(self) -> None:
        """Give every worker the mean of all workers' batch-norm statistics."""
        if self.world.size == 1:
            return
        for value in self.network.buffers():
            if value.is_floating_point():  # the counter of batches is equal on all workers
                self.world.all_reduce_sum(value).div_(self.world.size)


def _data_parallel(network: nn.Module) -> nn.Module:
    # Batch-norm statistics are averaged once per epoch instead of sent from rank 0 in every step.
    return nn.parallel.DistributedDataParallel(
        network, broadcast_buffers=False, gradient_as_bucket_view=True
    )
