"""Tags, data set and description of a run in MLflow, and the signature of its model.

Every run of this package gets its tags from `run_tags`, its data set from `dataset_of`, and a
description with the LINES, which `merge_note` writes.
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
from contextlib import suppress
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

Kind = Literal["training", "range test", "search", "trial", "cross-validation", "fold"]

SHARDS_TAG = "shards.fingerprint"
"""Tag of every run: the shard set that it was trained on."""
NOTE = "mlflow.note.content"
"""Tag that holds a run's description, which MLflow shows as Markdown."""
LINES = ("Test", "Validation", "Result", "Run", "Data", "Again")
"""Lines of a description, in their order."""
TAG_BYTES = 5000
"""MLflow's limit for the length of a tag."""
MLFLOW_TYPES = dict.fromkeys(("int8", "int32", "int64"), "long") | {"double": "double"}
"""MLflow's names of the Arrow types in the table of clips. Columns of other types are strings."""
PACKAGES = ("ray", "torch", "torchvision", "torchaudio", "numpy", "pyarrow", "mlflow")


def run_tags(kind: Kind, protocol: str, shards: ShardSet) -> dict[str, str]:
    """Return the tags of a run: its kind, protocol, shards and code.

    Args:
        kind: kind of the run.
        protocol: protocol and fold in words, as shown beside every score.
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
    """Describe this process, its code and its machine, as texts by name."""
    name_account()
    program = Path(sys.argv[0])
    # `python -m ser_ray` is ser-ray.
    command = "ser-ray" if program.parent.name == "ser_ray" else program.name
    facts = {f"version.{name}": version(name) for name in PACKAGES}
    facts |= {
        "version.ser_ray": __version__,
        "version.python": platform.python_version(),
        "hardware.machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "mlflow.user": getpass.getuser(),
        "mlflow.source.name": program.name,
        "command": shlex.join([command, *sys.argv[1:]])[:TAG_BYTES],
    }
    # The commit, with `-dirty` after it if files have changed since.
    describe = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    with suppress(OSError, subprocess.CalledProcessError):
        facts["mlflow.source.git.commit"] = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *describe],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    return facts


def data_line(shards: ShardSet) -> str:
    """Return the line of a description that says what a run was trained on."""
    card = shards.card
    return (
        f"{dataset_name(shards)}, {card.num_rows} clips, {len(card.labels)} labels, in "
        f"`{', '.join(shards.locations)}` (fingerprint {card.fingerprint})"
    )


def dataset_name(shards: ShardSet) -> str:
    """Name of a shard set in MLflow: its corpus, or the name of the table that lists its clips."""
    card = shards.card
    if shards.corpora:
        return card.source
    return PurePosixPath(card.source).stem if card.corpus == "table" else card.corpus


def dataset_of(shards: ShardSet) -> "DatasetInput":
    """Describe a shard set as the input of a run: name, fingerprint, location and columns."""
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
        profile=json.dumps({"num_clips": card.num_rows, "labels": list(card.labels)}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


def merge_note(note: str, lines: Mapping[str, str]) -> str:
    """Set some lines of a description. Its other lines do not change.

    Args:
        note: the present description, which may be empty.
        lines: text of each line to set, by its name in LINES.
    """
    merged = {**dict(re.findall(r"^\*\*(\w+)\*\*: (.*)$", note, re.MULTILINE)), **lines}
    return "\n\n".join(f"**{name}**: {merged[name]}" for name in LINES if name in merged)


def model_name(run_name: str) -> str:
    """Name of a run's model in MLflow: the run's name without forbidden characters."""
    return re.sub(r"[/:.%\"']", "-", run_name)


def model_signature(labels: Sequence[str]) -> Any:
    """Return the input and output columns of the packaged model (`ser_ray.inference.packaged`)."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema
    from mlflow.types.schema import AnyType

    inputs = ("path", "audio", "waveform", "sample_rate")
    # A recording that cannot be scored has no probabilities.
    probabilities = [ColSpec("double", label, required=False) for label in labels]
    texts = (ColSpec("string", name) for name in ("status", "reason", "warning"))
    return ModelSignature(
        Schema([ColSpec(AnyType(), name, required=False) for name in inputs]),
        Schema([ColSpec("string", "emotion"), *probabilities, *texts]),
    )
