"""What a user names, found: a model as a local checkpoint directory, and the files to predict.

A model is a checkpoint's folder or URI, an MLflow run's id, or a registered version
(`models:/ser-ray@champion`, `models:/ser-ray/3`). Files are files, folders, URIs and patterns.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory

from pyarrow import fs

from ser_ray.errors import CorpusError
from ser_ray.storage import filesystem_of, list_files

AUDIO_SUFFIXES = (
    ".wav", ".mp4", ".m4a", ".mp3", ".flac", ".ogg", ".opus", ".webm", ".mkv", ".mov", ".aac",
    ".aiff", ".amr", ".avi", ".wma",
)  # fmt: skip
"""What counts as audio or video in a folder; a file named itself may have any name."""

_RUN_ID = re.compile(r"[0-9a-f]{32}")


@contextmanager
def local_checkpoint(model: str, tracking_uri: str = "") -> Iterator[Path]:
    """A model as a local checkpoint directory, fetched for the block where it is not one.

    Args:
        model: checkpoint folder or URI, MLflow run id, or `models:/name@alias`.
        tracking_uri: where MLflow's names are looked up.

    Raises:
        TrackingError: no such run or registered model.
    """
    if model.startswith("models:/") or (_RUN_ID.fullmatch(model) and not Path(model).exists()):
        from ser_ray.registry import fetch_checkpoint

        with TemporaryDirectory() as folder:
            yield fetch_checkpoint(model, tracking_uri, Path(folder))
        return
    filesystem, path = filesystem_of(model)
    if isinstance(filesystem, fs.LocalFileSystem):
        yield Path(path)
        return
    with TemporaryDirectory() as folder:
        if filesystem.get_file_info(path).type == fs.FileType.Directory:
            fs.copy_files(path, folder, source_filesystem=filesystem)
        yield Path(folder)


def list_audio(sources: Sequence[str]) -> list[str]:
    """Files to score, each once: those named, those of audio or video in the folders named, and
    those that a pattern matches (`*` and `?` within a name, `**` over any number of folders).

    Raises:
        CorpusError: a source does not exist, or holds or matches no such file.
    """
    files: list[str] = []
    for source in sources:
        filesystem, path = filesystem_of(source)
        kind = filesystem.get_file_info(path).type
        if kind == fs.FileType.File:
            files.append(source)
        elif kind == fs.FileType.Directory:
            found = [file for file in list_files(source) if _is_audio(file.inside)]
            files += sorted(file.location for file in found)
            if not found:
                raise CorpusError(f"{source}: no audio or video file in this folder")
        elif set("*?[") & set(source):
            files += _matching(source)
        else:
            raise CorpusError(f"{source}: no such file or folder")
    return list(dict.fromkeys(files))


def _matching(pattern: str) -> list[str]:
    """Audio and video files that a pattern matches; other files only where it says their suffix."""
    fixed = re.match(r"(?:[^*?\[]*/)?", pattern)
    base = fixed[0] if fixed else ""
    wanted = pattern.removeprefix(base).split("/")
    try:
        found = [
            file.location
            for file in list_files(base or ".")
            if _matches(file.inside.split("/"), wanted)
            and (_is_audio(file.inside) or "." in wanted[-1])
        ]
    except OSError as error:
        raise CorpusError(f"{pattern}: {base} cannot be listed ({error})") from error
    if not found:
        raise CorpusError(f"{pattern}: matches no audio or video file")
    return sorted(found)


def _matches(names: Sequence[str], wanted: Sequence[str]) -> bool:
    if not wanted:
        return not names
    if wanted[0] == "**":
        return any(_matches(names[skip:], wanted[1:]) for skip in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], wanted[0]) and _matches(names[1:], wanted[1:])


def _is_audio(name: str) -> bool:
    return name.lower().endswith(AUDIO_SUFFIXES)
