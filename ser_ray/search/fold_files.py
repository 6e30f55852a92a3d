"""Writes and reads the files of a finished fold: its checkpoint, and its predictions as a table.

The process of a trial writes them. The driver reads the predictions of all folds. It needs the
checkpoints and the clips only for scores under recording conditions.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from ser_ray.errors import CheckpointError, first_line
from ser_ray.evaluation.evaluate import evaluate
from ser_ray.evaluation.evaluation import Evaluation, Part
from ser_ray.search.trial import TrialRecord
from ser_ray.shards.read import ShardSet
from ser_ray.storage.atomic import atomic_write
from ser_ray.storage.paths import filesystem_of, location_inside
from ser_ray.training.checkpoint import CARD, MODEL
from ser_ray.training.checkpoint_card import CARD_ERRORS, CheckpointCard
from ser_ray.training.recipe import TrainConfig

PREDICTIONS = "predictions.parquet"


def fold_folder(location: str, recipe: TrainConfig) -> str:
    """Return the folder of the files of a training, inside the folder of the cross-validation."""
    return location_inside(location, f"models/fold{recipe.fold}-seed{recipe.seed}")


def has_checkpoint(location: str, recipe: TrainConfig) -> bool:
    """Return whether the folder of a cross-validation has the weights of a training."""
    filesystem, path = filesystem_of(fold_folder(location, recipe))
    return bool(filesystem.get_file_info(f"{path}/{MODEL}").is_file)


def score_and_store_fold(
    checkpoint: Path, shards: ShardSet, recipe: TrainConfig, *, folder: str, part: Part
) -> None:
    """Score a part of a fold with its selected checkpoint, and store the files of the fold.

    Args:
        checkpoint: folder of the selected checkpoint.
        recipe: the recipe of the fold.
        folder: folder of the cross-validation.
    """
    table = evaluate(checkpoint, shards.locations, part=part).predictions
    for name, value in (("seed", recipe.seed), ("fold", recipe.fold)):
        column = pa.array(np.full(table.num_rows, value, np.int32))
        table = table.add_column(0, name, column)
    target = fold_folder(folder, recipe)
    filesystem, path = filesystem_of(target)
    filesystem.create_dir(path, recursive=True)
    for name in (CARD, MODEL):
        fs.copy_files(
            str(checkpoint / name), f"{path}/{name}", destination_filesystem=filesystem,
            use_threads=False,
        )  # fmt: skip
    write_predictions(table, target)


def write_predictions(predictions: pa.Table, folder: str) -> None:
    """Write a table of predictions into a folder. An interrupted call leaves no incomplete file."""
    filesystem, path = filesystem_of(location_inside(folder, PREDICTIONS))
    with atomic_write(filesystem, path) as stream:
        pq.write_table(predictions, stream)


def read_fold(part: Part, location: str, trial: TrialRecord, tracking_uri: str) -> Evaluation:
    """Read the evaluation of a fold from the files that `score_and_store_fold` wrote.

    Raises:
        CheckpointError: the files were deleted, or cannot be read.
    """
    folder = fold_folder(location, trial.recipe)
    filesystem, path = filesystem_of(folder)
    try:
        with filesystem.open_input_stream(f"{path}/{CARD}") as stream:
            card = CheckpointCard.from_json(stream.read().decode())
        predictions = pq.read_table(f"{path}/{PREDICTIONS}", filesystem=filesystem)
    except (OSError, *CARD_ERRORS) as error:
        raise CheckpointError(
            f"{folder}: the files of this finished fold are missing or cannot be read "
            f"({first_line(error)}); restore them, or give another --name to train the folds again"
        ) from error
    return Evaluation(
        card=card,
        part=part,
        protocol=card.split["label"],
        corpus=card.corpus,
        is_own_test=part == "test",
        seen_speakers=(),
        predictions=predictions,
        origin={"run_id": trial.run_id, "tracking_uri": tracking_uri},
        report=location_inside(location, trial.page),
    )
