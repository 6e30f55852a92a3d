"""The state of a training, and the methods that change it. `loop.fit` calls them in a training, and
`lr_range` calls some of them in a range test."""

import time
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ser_ray.errors import DivergedError, MismatchError
from ser_ray.shards.card import ShardCard
from ser_ray.training.augment import Augment
from ser_ray.training.calibration import fit_temperature
from ser_ray.training.checkpoint import VALIDATION_PROBABILITIES, Progress, Snapshot
from ser_ray.training.checkpoint_card import CheckpointCard
from ser_ray.training.data import Batch, FoldData, Source, steps_per_epoch
from ser_ray.training.metrics import Scores, scores_of, selected_epoch
from ser_ray.training.model import Pretrained, build_network, supports_bfloat16
from ser_ray.training.optim import (
    build_optimiser,
    one_cycle,
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
        row: metrics of the epoch, by their names in MLflow.
        learning_rates: learning rate of every step of the epoch.
        is_selected: whether this epoch is the one that is selected so far (`TrainConfig.keep`).
        progress: results of all epochs so far. The next epoch changes this object.
    """

    timestamp_ms: int
    row: dict[str, float]
    learning_rates: list[float]
    is_selected: bool
    progress: Progress


class Trainer:
    """The state of a training in one worker process.

    Args:
        recipe: the recipe.
        shards: the card of the shards.
        data: the clips of the fold.
        pretrained: initial weights that fit the network.
        device: where the network is trained.
        world: the rank of this worker, and the number of workers.
    """

    def __init__(
        self,
        recipe: TrainConfig,
        shards: ShardCard,
        data: FoldData[Source],
        pretrained: Pretrained,
        device: torch.device,
        world: World,
    ) -> None:
        self.recipe, self.data, self.device, self.world = recipe, data, device, world
        encoder, num_labels = shards.encoder_of(recipe.feature), len(data.labels)
        self.network = build_network(recipe, pretrained, num_labels, device, encoder)
        self.parallel = _data_parallel(self.network) if world.size > 1 else self.network
        self.augment = Augment(recipe, shards.features, num_labels, data.normalisation, device)
        bins, frames = len(data.normalisation.std), recipe.window_frames
        self.autocast = encoder is None and supports_bfloat16(device, bins, frames)
        self.batch_size = min(recipe.batch_size, len(data.train))
        self.steps_per_epoch = steps_per_epoch(len(data.train), self.batch_size)
        self.total_steps = recipe.epochs * self.steps_per_epoch
        self.optimiser = build_optimiser(self.network, recipe)
        self.schedule = one_cycle(self.optimiser, recipe, self.total_steps)
        self.losses = torch.zeros(self.steps_per_epoch, device=device)
        """Loss of each step of the epoch. A worker stores its share, and `reduce_counts` sums the
        shares."""
        self.num_correct = torch.zeros((), device=device)
        """Number of correct predictions in this epoch, counted and summed like the losses."""
        self.validation_probabilities = torch.zeros(0, num_labels, dtype=torch.float64)
        """Probabilities of the last validation [clips, labels]; empty before the first."""
        self.progress = Progress()
        self.batches = data.train.batches(recipe, world, epoch=0, step=0)

    @property
    def finished(self) -> bool:
        """Whether all epochs are completed."""
        return self.progress.epoch >= self.recipe.epochs

    @property
    def epoch_finished(self) -> bool:
        """Whether all steps of the current epoch are completed."""
        return self.progress.step >= self.steps_per_epoch

    @property
    def completed_steps(self) -> int:
        """Number of completed steps of the training."""
        return self.progress.epoch * self.steps_per_epoch + self.progress.step

    def begin_epoch(self) -> None:
        """Begin an epoch, or resume it at its next step."""
        self.first_step, self.began = self.progress.step, time.perf_counter()
        self.network.train()

    def train_step(self) -> None:
        """Update the weights with the next batch, and advance the learning rate."""
        self.progress.learning_rates.append(float(self.schedule.get_last_lr()[0]))
        loss, num_correct = self.update_weights(next(self.batches))
        self.losses[self.progress.step] = loss
        self.num_correct += num_correct
        self.progress.step += 1
        if self.completed_steps < self.total_steps:  # OneCycleLR raises after its last step
            self.schedule.step()

    def update_weights(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Make an optimiser step on a batch.

        Returns:
            How much this worker's clips add to the mean loss of the batch, and how many of these
            clips were classified correctly.
        """
        torch.manual_seed(batch.seed)
        features, targets = self.augment(batch.clips, batch.rows)
        features = features[batch.rank_slice].contiguous(memory_format=torch.channels_last)
        targets = targets[batch.rank_slice]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            logits = self.parallel(features)
            total = F.cross_entropy(
                logits, targets, reduction="sum", label_smoothing=self.recipe.label_smoothing
            )
        loss = total / self.batch_size
        self.optimiser.zero_grad(set_to_none=True)
        # DDP averages the workers' gradients, but the batch's gradient is their sum.
        (loss * self.world.size).backward()
        self.optimiser.step()
        num_correct = (logits.argmax(dim=1) == targets.argmax(dim=1)).sum()
        return loss.detach(), num_correct

    def finish_steps(self) -> None:
        """Sum the losses and counts of the epoch over the workers, and check losses and weights.

        Raises:
            DivergedError: a loss of this epoch or a weight is not finite.
        """
        self.reduce_counts(on_all_workers=True)
        self._require_finite()
        self.training_seconds = time.perf_counter() - self.began

    def validate(self) -> Scores | None:
        """Average the batch-norm statistics, and score the validation clips.

        Return None if there are no validation clips. Each worker predicts its share of the clips.
        All workers get the same scores.
        """
        self.average_batch_norm()
        clips, num_labels = self.data.validation, len(self.data.labels)
        if not len(clips):
            return None
        truth, share = clips.truth, self.world.rank_slice
        selected = np.arange(len(truth))[share]
        predicted = predict_clips(self.network, clips, selected, self.recipe, num_labels)
        shape = len(truth), num_labels
        probabilities = torch.zeros(shape, dtype=torch.float64, device=self.device)
        probabilities[share] = torch.from_numpy(predicted).to(self.device)
        self.validation_probabilities = self.world.all_reduce_sum(probabilities)
        return scores_of(truth, probabilities.cpu().numpy())

    def finish_epoch(self, scores: Scores | None) -> EpochReport:
        """Record the completed epoch with its validation scores, and reset the counts."""
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
        is_selected = selected_epoch(progress.history, self.recipe.keep) == progress.epoch
        if is_selected:
            progress.selected = row
            progress.selected_confusion = [] if scores is None else scores.confusion.tolist()
        learning_rates = progress.learning_rates[-self.steps_per_epoch :]
        progress.epoch, progress.step = progress.epoch + 1, 0
        self._reset_counts()
        return EpochReport(progress.times_ms[-1], row, learning_rates, is_selected, progress)

    def reduce_counts(self, *, on_all_workers: bool = False) -> None:
        """Sum the losses and counts of the epoch over the workers.

        The first worker gets the sums. The other workers get them too if `on_all_workers` is True.
        Otherwise they count from 0 again, so that a later sum counts each clip once.
        """
        self.world.all_reduce_sum(self.losses)
        self.world.all_reduce_sum(self.num_correct)
        if self.world.rank > 0 and not on_all_workers:
            self._reset_counts()

    def snapshot(self, card: CheckpointCard) -> Snapshot:
        """Copy the state for a checkpoint.

        The card gets the temperature that fits the last validation, or 1 before the first. If there
        are no validation clips, the card gets the recipe's temperature.
        """
        temperature = self.recipe.temperature
        if len(self.data.validation):
            probabilities = self.validation_probabilities.cpu().numpy()
            truth = self.data.validation.truth[: len(probabilities)]  # empty before a validation
            temperature = fit_temperature(truth, probabilities)
        card = replace(card, temperature=temperature)
        state = {
            "losses": self.losses,
            "num_correct": self.num_correct,
            VALIDATION_PROBABILITIES: self.validation_probabilities,
            **optimiser_tensors(self.optimiser),
        }
        weights = _copy_tensors(self.network.state_dict())
        return Snapshot(card, weights, _copy_tensors(state), asdict(self.progress))

    def restore(self, snapshot: Snapshot) -> None:
        """Set the state to that of a snapshot.

        Raises:
            MismatchError: the snapshot has another number of steps per epoch or another network, or
                some of its tensors are missing.
        """
        state, progress = snapshot.state, Progress.from_dict(snapshot.progress)
        num_steps = len(progress.learning_rates)
        if num_steps != progress.epoch * self.steps_per_epoch + progress.step:
            raise MismatchError(
                f"the checkpoint has {num_steps} steps: {progress.epoch} complete epochs and "
                f"{progress.step} steps of the next one. Here, an epoch has "
                f"{self.steps_per_epoch} steps: give another --name to start afresh"
            )
        try:
            self.network.load_state_dict(snapshot.weights)
            restore_optimiser(self.optimiser, state)
            if self.world.rank == 0:  # the counts are sums over all workers
                self.losses.copy_(state["losses"])
                self.num_correct.copy_(state["num_correct"])
            num_validated = len(self.data.validation.truth) if progress.epoch else 0
            shape = num_validated, len(self.data.labels)
            probabilities = torch.zeros(shape, dtype=torch.float64, device=self.device)
            self.validation_probabilities = probabilities.copy_(state[VALIDATION_PROBABILITIES])
        except (RuntimeError, ValueError, LookupError) as error:
            raise MismatchError(
                f"the checkpoint's state does not fit this training ({str(error)[:200]}): give "
                "another --name to start afresh"
            ) from error
        restore_schedule(self.schedule, min(num_steps, self.total_steps - 1))
        self.progress = progress
        start = progress.epoch, progress.step
        self.batches = self.data.train.batches(self.recipe, self.world, *start)

    def _reset_counts(self) -> None:
        self.losses.zero_()
        self.num_correct.zero_()

    def _require_finite(self) -> None:
        epoch = self.progress.epoch
        diverged = torch.nonzero(~torch.isfinite(self.losses))
        if len(diverged):
            step = int(diverged[0])
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

    def average_batch_norm(self) -> None:
        """Replace the batch-norm statistics of each worker by their mean over all workers."""
        for value in self.network.buffers():
            if value.is_floating_point():  # the counter of batches is equal on all workers
                self.world.all_reduce_sum(value).div_(self.world.size)


def _copy_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # The training's thread makes the copies. If the thread that writes the checkpoint made them,
    # torch would start a second pool of CPU threads. With more threads than CPUs, training is slow.
    return {
        name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()
    }


def _data_parallel(network: nn.Module) -> nn.Module:
    # The batch-norm statistics are not sent in every step. `average_batch_norm` averages them at
    # the end of each epoch, and before a checkpoint in mid-epoch.
    return nn.parallel.DistributedDataParallel(
        network, broadcast_buffers=False, gradient_as_bucket_view=True
    )
