"""Writes and reads checkpoints. A checkpoint is a directory with these files:

    model.safetensors           the network's weights
    card.json                   recipe, labels, normalisation, protocol and fold, shard set
    training_state.safetensors  the other tensors that a resume needs, mostly the optimiser's
    progress.json               the `Progress` of the training, and the sizes of the files above

`progress.json` is written last. A checkpoint is complete if its files have the sizes that this file
lists; no training resumes from an incomplete checkpoint. The selected checkpoint of a finished run
lacks the files that only a resume needs. If the network is a head on an encoder, it can have the
encoder's weights, `encoder.safetensors`.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pyarrow import fs
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ser_ray.errors import CheckpointError, ConfigError, EncoderError
from ser_ray.features.config import require_valid
from ser_ray.storage.json_text import read_object
from ser_ray.storage.paths import filesystem_of, location_inside
from ser_ray.training.checkpoint_card import CARD_ERRORS, CheckpointCard
from ser_ray.training.model import EncoderHead, ResNet18, new_network

if TYPE_CHECKING:
    from ser_ray.features.encoder import Encoder

CARD, MODEL, STATE = "card.json", "model.safetensors", "training_state.safetensors"
PROGRESS = "progress.json"
ENCODER = "encoder.safetensors"
"""File of the encoder's weights. Only selected checkpoints of a head on an encoder can have it."""
SELECTED = "selected"
"""Folder of the selected checkpoint, in the folder of a finished run."""
VALIDATION_PROBABILITIES = "validation_probabilities"
"""Name of a tensor in STATE: the probabilities of the validation clips [clips, labels]."""


@dataclass(slots=True)
class Progress:
    """Progress of a training and its results so far. Every checkpoint contains it."""

    epoch: int = 0
    """Number of completed epochs."""
    step: int = 0
    """Number of completed steps in the current epoch."""
    learning_rates: list[float] = field(default_factory=list)
    """Learning rate of every completed step of all epochs."""
    selected: dict[str, float] = field(default_factory=dict)
    """Metrics of the epoch that is selected so far; empty in the first epoch."""
    selected_confusion: list[list[int]] = field(default_factory=list)
    """Confusion matrix of its validation clips (`Scores.confusion`); empty without such clips."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Metrics of every completed epoch."""
    times_ms: list[int] = field(default_factory=list)
    """When each completed epoch ended, in milliseconds since 1970."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Progress":
        """Build a `Progress` from the content of a progress file, which has more keys.

        Raises:
            ValueError, KeyError, ConfigError: values are missing or inconsistent.
        """
        progress = cls(**{item.name: values[item.name] for item in fields(cls)})
        require_valid(progress)
        num_epochs = len(progress.history)
        earlier_steps = len(progress.learning_rates) - progress.step
        if progress.step < 0 or earlier_steps < 0 or (earlier_steps > 0) != (num_epochs > 0):
            raise ValueError("the number of steps does not match the number of epochs")
        if progress.epoch != num_epochs or len(progress.times_ms) != num_epochs:
            raise ValueError("the number of epochs does not match the history")
        if any("epoch" not in row for row in (*progress.history, progress.selected) if row):
            raise ValueError("a row of the history has no epoch")
        return progress


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A copy of the state of a training between two steps. Further steps do not change the copy.

    Args:
        card: describes the weights.
        weights: the network's weights by name, contiguous.
        state: the other tensors that a resume needs, by name, contiguous.
        progress: the fields of `Progress`, as JSON types.
    """

    card: CheckpointCard
    weights: dict[str, Tensor]
    state: dict[str, Tensor]
    progress: dict[str, Any]

    @classmethod
    def read(cls, directory: Path) -> "Snapshot":
        """Read a complete checkpoint into the CPU's memory.

        Raises:
            CheckpointError: the checkpoint is missing or broken, or has no training state.
        """
        card = read_card(directory)
        if not (directory / STATE).exists():
            raise CheckpointError(
                f"{directory}: this folder holds a model without the state of its training (no "
                f"{STATE}), so no training can resume from it; give a folder checkpoint-EPOCH-STEP "
                "of the run, or start a new training"
            )
        try:
            weights, state = (load_file(directory / name) for name in (MODEL, STATE))
            progress = read_object((directory / PROGRESS).read_text())
            Progress.from_dict(progress)
            return cls(card, weights, state, progress)
        except (OSError, SafetensorError, ValueError, KeyError, ConfigError) as error:
            raise CheckpointError(
                f"{directory}: the training's state cannot be loaded ({error}); delete this folder "
                "and run the same command again to resume from the previous checkpoint"
            ) from error

    @property
    def name(self) -> str:
        """Name of the checkpoint's directory. Names sort by age."""
        return checkpoint_name(self.progress["epoch"], self.progress["step"])

    def write(self, directory: Path) -> None:
        """Write the checkpoint into an existing directory."""
        # torch.save holds the GIL, which delays training on a GPU. safetensors does not hold it.
        save_file(self.weights, directory / MODEL)
        save_file(self.state, directory / STATE)
        (directory / CARD).write_text(self.card.to_json())
        sizes = {name: (directory / name).stat().st_size for name in (MODEL, STATE, CARD)}
        (directory / PROGRESS).write_text(json.dumps(self.progress | {"sizes": sizes}))

    def store(self, filesystem: fs.FileSystem, path: str) -> None:
        """Write the checkpoint to storage. An earlier checkpoint at this path is replaced."""
        if filesystem.get_file_info(path).type != fs.FileType.NotFound:
            filesystem.delete_dir(path)
        filesystem.create_dir(path, recursive=True)
        if isinstance(filesystem, fs.LocalFileSystem):
            self.write(Path(path))
            return
        with tempfile.TemporaryDirectory() as directory:
            self.write(Path(directory))
            # Threads break uploads to S3: https://github.com/apache/arrow/issues/32372
            fs.copy_files(directory, path, destination_filesystem=filesystem, use_threads=False)


def checkpoint_name(epoch: int, step: int = 0) -> str:
    """Return the name of the directory for `epoch` completed epochs and `step` further steps."""
    return f"checkpoint-{epoch:06d}-{step:06d}"


def read_progress(filesystem: fs.FileSystem, path: str) -> dict[str, Any] | None:
    """Read the progress file of a checkpoint. Return None if the checkpoint is incomplete."""
    try:
        with filesystem.open_input_stream(f"{path}/{PROGRESS}") as stream:
            progress = read_object(stream.read())
        Progress.from_dict(progress)
        files = filesystem.get_file_info([f"{path}/{name}" for name in (MODEL, STATE, CARD)])
        complete = progress["sizes"] == {file.base_name: file.size for file in files}
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, ConfigError):
        return None  # a file is missing, damaged or still being written
    return progress if complete else None


@contextmanager
def local_checkpoint(location: str) -> Iterator[Path]:
    """Yield the local directory of a checkpoint.

    A checkpoint in remote storage is downloaded, and the download is deleted at the end. An error
    that the caller raises about the download gets the name of the remote folder.

    Args:
        location: folder or URI of the checkpoint, or of a finished run.

    Raises:
        CheckpointError: the storage cannot be read.
        ConfigError: no filesystem can open the location.
    """
    filesystem, path = filesystem_of(location)
    with ExitStack() as stack:
        try:
            card, selected = filesystem.get_file_info(
                [f"{path}/{CARD}", f"{path}/{SELECTED}/{CARD}"]
            )
            if card.type == fs.FileType.NotFound and selected.type == fs.FileType.File:
                path, location = f"{path}/{SELECTED}", location_inside(location, SELECTED)
            local = Path(path)
            if not isinstance(filesystem, fs.LocalFileSystem):
                local = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                if filesystem.get_file_info(path).type == fs.FileType.Directory:
                    fs.copy_files(path, str(local), source_filesystem=filesystem)
        except OSError as error:
            raise CheckpointError(f"{location}: cannot be read ({error})") from error
        try:
            yield local
        except (CheckpointError, EncoderError) as error:
            if isinstance(filesystem, fs.LocalFileSystem):
                raise
            raise type(error)(str(error).replace(str(local), location)) from error


def read_card(directory: Path) -> CheckpointCard:
    """Read the card of a checkpoint.

    Raises:
        CheckpointError: there is no checkpoint, or its card cannot be read.
    """
    path = directory / CARD
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: no checkpoint here (no {CARD}); ser-ray train writes checkpoints and "
            "prints where they are"
        )
    try:
        return CheckpointCard.from_json(path.read_text())
    except (OSError, *CARD_ERRORS) as error:
        raise CheckpointError(f"{path}: cannot be read as a checkpoint's card ({error})") from error


def read_network(directory: Path, card: CheckpointCard) -> ResNet18 | EncoderHead:
    """Read the network of a checkpoint onto the CPU, in evaluation mode.

    Raises:
        CheckpointError: the weights are missing or broken, or belong to another network.
    """
    with torch.device("meta"):  # saves the time of drawing initial weights
        network = new_network(len(card.labels), card.encoder, card.config.head_units)
    try:
        # safetensors maps the file into memory. The clones do not need the file.
        weights = {name: value.clone() for name, value in load_file(directory / MODEL).items()}
        network.load_state_dict(weights, assign=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{directory / MODEL}: cannot be loaded ({reason})") from error
    return network.eval()


def read_layer_weights(directory: Path, card: CheckpointCard) -> list[float]:
    """Read the weights of the encoder's layers in the head [layers]; empty without an encoder."""
    if card.encoder is None:
        return []
    network = read_network(directory, card)
    assert isinstance(network, EncoderHead)
    return network.layer_weights.tolist()


def read_encoder(directory: Path, card: CheckpointCard) -> "Encoder | None":
    """Read the encoder of a model onto the CPU, in evaluation mode; None if the model has none.

    The weights are read from the checkpoint's directory, or else from their location during the
    training. If they are in neither place, torchaudio's weights of this encoder are downloaded.

    Raises:
        EncoderError: no readable weights were found, or they differ from those of the training.
    """
    if card.encoder is None:
        return None
    from ser_ray.features.encoder import EncoderWeights  # slow: torchaudio

    name = card.encoder.name
    if (directory / ENCODER).is_file():
        found = EncoderWeights.read(str(directory / ENCODER))
    else:
        try:
            found = EncoderWeights.read(card.encoder_file)
        except EncoderError as error:
            try:
                found = EncoderWeights.load(name)
            except (EncoderError, ConfigError):
                raise EncoderError(
                    f"{directory}: the weights of the encoder {name} cannot be read from where "
                    f"they were during the training ({error}); put them into this folder as "
                    f"{ENCODER}"
                ) from None
    if found.card.weights != card.encoder.weights:
        raise EncoderError(
            f"{directory}: the weights found for {name} have the hash {found.card.weights[:16]}, "
            f"but the model was trained with {card.encoder.weights[:16]}: put the weights of the "
            f"training into this folder as {ENCODER}"
        )
    return found.build()


def copy_encoder(directory: Path) -> None:
    """Copy the encoder's weights, if the model has an encoder, into a checkpoint's directory.

    Raises:
        CheckpointError: the weights cannot be copied from their location during the training.
    """
    card = read_card(directory)
    if card.encoder is None or (directory / ENCODER).exists():
        return
    filesystem, path = filesystem_of(card.encoder_file)
    copy = directory / f"{ENCODER}.tmp"
    try:
        fs.copy_files(path, str(copy), source_filesystem=filesystem)
        copy.replace(directory / ENCODER)
    except OSError as error:
        raise CheckpointError(
            f"{card.encoder_file}: the encoder's weights cannot be copied into the checkpoint "
            f"({error}); restore this file, then run the same command again"
        ) from error


def learning_rates_by_epoch(progress: dict[str, Any]) -> list[list[float]]:
    """Return the learning rates of the steps of each epoch, from the content of a progress file."""
    learning_rates, num_epochs = progress["learning_rates"], len(progress["history"])
    steps = (len(learning_rates) - progress["step"]) // max(num_epochs, 1)
    return [learning_rates[epoch * steps : (epoch + 1) * steps] for epoch in range(num_epochs)]
