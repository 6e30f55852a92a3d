"""Makes the texts that MLflow shows with a run, and the signature of its model.

`run_tags` makes the tags of a run, `dataset_of` makes its data set, and `merge_note` makes its
description, which consists of the lines that LINES names.
"""

import getpass
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from ser_ray.corpus.words import CORPORA
from ser_ray.features.config import KINDS
from ser_ray.shards.read import ShardSet
from ser_ray.storage.paths import name_account
from ser_ray.tracking.store import configure_mlflow_client
from ser_ray.version import __version__

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

RunKind = Literal["training", "range test", "search", "trial", "cross-validation", "fold"]

SHARDS_TAG = "shards.fingerprint"
"""Tag of every run: the fingerprint of the shard set that it was trained on."""
NOTE = "mlflow.note.content"
"""Tag that holds a run's description, which MLflow shows as Markdown."""
LINES = ("Test", "Validation", "Result", "Run", "Data", "Again")
"""Names of the lines of a description, in order."""
MAX_TAG_LENGTH = 5000
"""Largest length of a tag's value or a description that every store of MLflow accepts."""
MLFLOW_TYPES = {"int8": "long", "int32": "long", "int64": "long", "double": "double"}
"""MLflow's names of the Arrow types of the clips' columns. Other columns are strings."""
INTERACTIVE = ("", "-c", "ipykernel_launcher.py")
"""Names of the program in a prompt, in `python -c` and in a notebook, where no command can be
given again."""
PACKAGES = ("ray", "torch", "torchvision", "torchaudio", "numpy", "pyarrow", "mlflow")


def run_tags(kind: RunKind, protocol: str, shards: ShardSet) -> dict[str, str]:
    """Return the tags of a run: its kind, protocol, shards, command, user and code.

    Args:
        protocol: protocol and fold as text, as shown beside every score.
        shards: the shards that the run trains on.
    """
    facts = provenance()
    shown = ("command", "mlflow.user", "mlflow.source.name", "mlflow.source.git.commit")
    return {
        "kind": kind,
        "protocol": protocol,
        "corpus": shards.card.corpus,
        SHARDS_TAG: shards.card.fingerprint,
        **{name: facts[name] for name in shown if name in facts},
    }


def scored_on(tags: Mapping[str, str]) -> str:
    """Return the protocol and corpus of a run with these tags, as shown beside every score."""
    return f"{tags['protocol']}, {CORPORA[tags['corpus']]}"


def provenance() -> dict[str, str]:
    """Return facts about this process, its code and its machine, by name."""
    name_account()
    program = Path(sys.argv[0])
    # The program of `python -m ser_ray` is ser_ray/__main__.py.
    command = "ser-ray" if program.parent.name == "ser_ray" else program.name
    facts = {f"version.{name}": version(name) for name in PACKAGES} | {
        "version.ser_ray": __version__,
        "version.python": platform.python_version(),
        "hardware.machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "mlflow.user": getpass.getuser(),
        "mlflow.source.name": program.name,
    }
    if program.name not in INTERACTIVE:
        facts["command"] = shlex.join([command, *sys.argv[1:]])[:MAX_TAG_LENGTH]
    if commit := git_commit():
        facts["mlflow.source.git.commit"] = commit
    return facts


@cache
def git_commit() -> str:
    """Return the commit of this code, with `-dirty` if files have changed; empty outside of git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run([*git, *describe], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def data_line(shards: ShardSet) -> str:
    """Return the line of a description that names the shards of a run."""
    card = shards.card
    return (
        f"{dataset_name(shards)}, {shards.num_clips} clips, {len(card.labels)} labels, in "
        f"`{', '.join(shards.locations)}` (fingerprint {card.fingerprint})"
    )


def dataset_name(shards: ShardSet) -> str:
    """Return the name of a shard set in MLflow: its corpora, or the table that lists its clips."""
    card = shards.card
    if shards.corpora:
        return card.source
    return PurePosixPath(card.source).stem if card.corpus == "table" else card.corpus


def dataset_of(shards: ShardSet) -> "DatasetInput":
    """Return MLflow's entry for a shard set: name, fingerprint, location and columns."""
    configure_mlflow_client()
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.types import ColSpec, Schema

    card, first = shards.card, shards.locations[0]
    columns = [
        ColSpec(MLFLOW_TYPES.get(str(field.type), "string"), field.name)
        for field in shards.clips().schema
    ]
    schema = Schema([*columns, *(ColSpec("binary", kind) for kind in KINDS)])
    dataset = Dataset(
        name=dataset_name(shards),
        digest=card.fingerprint,
        source_type="local" if "://" not in first else first.partition("://")[0],
        source=json.dumps({"uri": " ".join(shards.locations)}),
        schema=json.dumps({"mlflow_colspec": schema.to_dict()}),
        profile=json.dumps({"num_clips": shards.num_clips, "labels": list(card.labels)}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


def merge_note(note: str, lines: Mapping[str, str]) -> str:
    """Return a description in which some lines are set. Its other lines do not change.

    Args:
        note: the description until now, which may be empty.
        lines: texts of the lines to set, by their names in LINES. An empty text removes a line.
    """
    line = re.compile(rf"^\*\*({'|'.join(LINES)})\*\*: (.*)$", re.MULTILINE)
    merged = {**dict(line.findall(note)), **lines}
    ours = [f"**{name}**: {merged[name]}" for name in LINES if merged.get(name)]
    others = re.sub(r"\n{3,}", "\n\n", line.sub("", note)).strip()
    return "\n\n".join([*ours, others] if others else ours)


def model_name(run_name: str) -> str:
    """Return the name of a run's model in MLflow: the run's name without forbidden characters."""
    return re.sub(r"[/:.%\"']", "-", run_name)


def model_signature(labels: Sequence[str]) -> Any:
    """Return the input and output columns of the packaged model (`ser_ray.inference.packaged`)."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema
    from mlflow.types.schema import AnyType

    from ser_ray.inference.packaged import RECORDING_COLUMNS, TEXT_COLUMNS, probability_column

    inputs = (*RECORDING_COLUMNS, "sample_rate")
    # A recording that cannot be scored has no probabilities.
    names = map(probability_column, labels)
    probabilities = [ColSpec("double", name, required=False) for name in names]
    emotion, *texts = (ColSpec("string", name) for name in TEXT_COLUMNS)
    return ModelSignature(
        Schema([ColSpec(AnyType(), name, required=False) for name in inputs]),
        Schema([emotion, *probabilities, *texts]),
    )
