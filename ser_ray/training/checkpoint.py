"""Checkpoints: a directory that describes itself.

    model.safetensors      the network's weights (the averaged ones where averaging is on)
    card.json              what they are: recipe, labels, normalisation, protocol and fold, data
    training_state.safetensors  tensors that going on needs beside them: the optimiser's, above all
    progress.json          how far it is, how it went, what else going on needs, and the sizes of
                           the files above

`progress.json` is written last: a directory whose files have the sizes that it names was written to
its end. One that lacks a file or does not fit is refused with the difference named.
"""

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pyarrow import fs
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ser_ray.corpus.ravdess import CORPORA
from ser_ray.errors import CheckpointError, MismatchError
from ser_ray.features.config import FeatureConfig
from ser_ray.training.config import TrainConfig
from ser_ray.training.data import Normalisation
from ser_ray.training.model import ResNet18

SCHEMA_VERSION = 1
CARD, MODEL, STATE = "card.json", "model.safetensors", "training_state.safetensors"
PROGRESS = "progress.json"
VALIDATION = "validation_probabilities"
"""Name of the tensor in STATE that holds the probabilities of the validation clips [clips, labels].
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointCard:
    """Everything a reader must know of the weights beside it."""

    labels: tuple[str, ...]
    """Label of every output."""
    config: TrainConfig
    """The recipe."""
    features: FeatureConfig
    """How a clip becomes what the network sees."""
    normalisation: Normalisation
    """Applied to the features before the network."""
    corpus: str
    """ravdess, synthetic or table."""
    shards_fingerprint: str
    """Identity of the shard set trained on."""
    split: dict[str, Any]
    """The protocol and fold in words, whether speaker-dependent, the speakers of each side."""
    initial_weights: str
    """Where the network started."""
    ingest: Literal["resident", "stream"] = "resident"
    """How the training clips came, and so in what order."""

    @property
    def trained_on(self) -> str:
        """The corpus in words, as it is shown beside every score."""
        return CORPORA[self.corpus]

    def to_json(self) -> str:
        """Serialise."""
        values = asdict(self) | {
            "schema_version": SCHEMA_VERSION,
            "normalisation": {
                "mean": self.normalisation.mean.tolist(),
                "std": self.normalisation.std.tolist(),
            },
        }
        return json.dumps(values, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "CheckpointCard":
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: another schema version.
        """
        values = json.loads(text)
        version = values.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise CheckpointError(
                f"the card has schema version {version}, this program reads {SCHEMA_VERSION}: "
                "use the ser-ray version that wrote it, or train again"
            )
        normalisation = values.pop("normalisation")
        return cls(
            labels=tuple(values.pop("labels")),
            config=TrainConfig.from_dict(values.pop("config")),
            features=FeatureConfig(**values.pop("features")),
            normalisation=Normalisation(
                np.asarray(normalisation["mean"]), np.asarray(normalisation["std"])
            ),
            **values,
        )

    def require_same(self, other: "CheckpointCard", where: str) -> None:
        """Refuse to go on from a checkpoint of another training.

        Raises:
            MismatchError: names the first field that differs.
        """
        mine, theirs = json.loads(self.to_json()), json.loads(other.to_json())
        keys = ("labels", "features", "shards_fingerprint", "split", "config", "ingest")
        difference = name_difference(*({key: card[key] for key in keys} for card in (theirs, mine)))
        if difference:
            raise MismatchError(
                f"{where}: its {difference}; give the run another --name to start afresh, or "
                "restore what it was trained with"
            )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A training between two steps, held still: nothing in it changes while it is written.

    Args:
        weights: the network's weights that a reader gets, each contiguous.
        state: tensors that going on needs beside them, each contiguous.
        progress: how far the training is, how it went and what else going on needs, in JSON's own
            types.
    """

    card: CheckpointCard
    weights: dict[str, Tensor]
    state: dict[str, Tensor]
    progress: dict[str, Any]

    @classmethod
    def read(cls, directory: Path) -> "Snapshot":
        """Read a whole checkpoint, its tensors onto the CPU.

        Raises:
            CheckpointError: missing or broken.
        """
        card = read_card(directory)
        if not (directory / STATE).exists():
            raise CheckpointError(
                f"{directory}: without {STATE}, so another version of ser-ray wrote it: go on with "
                "that one, or give another --name to start afresh"
            )
        try:
            weights, state = (load_file(directory / name) for name in (MODEL, STATE))
            return cls(card, weights, state, json.loads((directory / PROGRESS).read_text()))
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(
                f"{directory}: the state of a training cannot be loaded from it ({error}); delete "
                "this folder, and the same command goes on from the checkpoint before it"
            ) from error

    @property
    def name(self) -> str:
        """Name of its directory: epochs done and steps of the next; sorts by age."""
        return checkpoint_name(self.progress["epoch"], self.progress["step"])

    def write(self, directory: Path) -> None:
        """Write a whole checkpoint into an existing directory."""
        # torch.save keeps Python to itself for long: on a GPU the training beside it would wait.
        save_file(self.weights, directory / MODEL)
        save_file(self.state, directory / STATE)
        (directory / CARD).write_text(self.card.to_json())
        sizes = {name: (directory / name).stat().st_size for name in (MODEL, STATE, CARD)}
        (directory / PROGRESS).write_text(json.dumps(self.progress | {"sizes": sizes}))

    def store(self, filesystem: fs.FileSystem, path: str) -> None:
        """Write a whole checkpoint into a storage, in place of what an interruption left there."""
        if filesystem.get_file_info(path).type != fs.FileType.NotFound:
            filesystem.delete_dir(path)
        filesystem.create_dir(path, recursive=True)
        if isinstance(filesystem, fs.LocalFileSystem):
            self.write(Path(path))
            return
        with tempfile.TemporaryDirectory() as directory:
            self.write(Path(directory))
            # Threads spoil uploads to S3: https://github.com/apache/arrow/issues/32372
            fs.copy_files(directory, path, destination_filesystem=filesystem, use_threads=False)


def checkpoint_name(epoch: int, step: int = 0) -> str:
    """Name of the checkpoint after so many epochs and so many steps of the next."""
    return f"checkpoint-{epoch:04d}-{step:06d}"


def read_progress(filesystem: fs.FileSystem, path: str) -> dict[str, Any] | None:
    """Read how far a stored checkpoint's training was; None where it was not written to its end."""
    try:
        with filesystem.open_input_stream(f"{path}/{PROGRESS}") as stream:
            progress: dict[str, Any] = json.loads(stream.read())
        sizes = progress["sizes"]
        files = filesystem.get_file_info([f"{path}/{name}" for name in sizes])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return None
    whole = all(file.size == size for file, size in zip(files, sizes.values(), strict=True))
    return progress if whole else None


def read_card(directory: Path) -> CheckpointCard:
    """Read a checkpoint's card.

    Raises:
        CheckpointError: no checkpoint there, or its card cannot be read.
    """
    path = directory / CARD
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: no checkpoint here (no {CARD}); ser-ray train writes one and prints "
            "where it is"
        )
    try:
        return CheckpointCard.from_json(path.read_text())
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a checkpoint's card ({error})") from error


def read_network(directory: Path, card: CheckpointCard) -> ResNet18:
    """Read the network of a checkpoint, in evaluation mode, on the CPU.

    Raises:
        CheckpointError: the weights are missing, broken or another network's.
    """
    with torch.device("meta"):  # takes no time for initial weights
        network = ResNet18(len(card.labels))
    try:
        # Cloned, because what is loaded lies in the mapped file, which must not be held.
        weights = {name: value.clone() for name, value in load_file(directory / MODEL).items()}
        network.load_state_dict(weights, assign=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{directory / MODEL}: cannot be loaded ({reason})") from error
    return network.eval()


def learning_rates_by_epoch(progress: dict[str, Any]) -> list[list[float]]:
    """Learning rate of every step of each epoch that a checkpoint knows whole."""
    learning_rates, num_epochs = progress["learning_rates"], len(progress["history"])
    steps = (len(learning_rates) - progress["step"]) // max(num_epochs, 1)
    return [learning_rates[epoch * steps : (epoch + 1) * steps] for epoch in range(num_epochs)]


def name_difference(theirs: dict[str, Any], mine: dict[str, Any]) -> str:
    """Name the first entry in which two JSON mappings differ, with both values; empty for none."""
    for key in mine:
        if theirs.get(key) != mine[key]:
            return f"{key} is {_short(theirs.get(key), mine[key])}"
    return ""


def _short(theirs: Any, mine: Any) -> str:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        names = [key for key in mine if theirs.get(key) != mine[key]]
        return ", ".join(f"{key} {theirs.get(key)!r} instead of {mine[key]!r}" for key in names[:3])
    return f"{theirs!r} instead of {mine!r}"
