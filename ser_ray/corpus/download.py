"""RAVDESS from its Zenodo record: which archives, where to, and nothing twice.

A `DownloadConfig` comes in; out come folders of clips as `ser_ray.corpus.manifest` lists them. Each
archive is fetched (`ser_ray.corpus.fetch`), checked against the record's own checksum and unpacked
(`ser_ray.corpus.unpack`) into a folder of its name, which appears whole or not at all. Interrupted
anywhere, the same call goes on where it was.

RAVDESS is under CC BY-NC-SA 4.0; see https://zenodo.org/records/1188976.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from ser_ray.errors import ConfigError, CorpusError
from ser_ray.progress import show_progress

if TYPE_CHECKING:
    from ser_ray.corpus.fetch import Archive

Part = Literal["speech", "song", "video-speech", "video-song"]
PARTS: tuple[Part, ...] = get_args(Part)
ACTORS = tuple(range(1, 25))
ACTORS_WITHOUT_SONG = (18,)

# Bytes that a byte of an archive becomes. Measured: 208 MB of speech are 514 MB of wav.
_GROWTH = {"Audio": 2.6, "Video": 1.05}
_MAX_GROWTH = 10
"""An archive that would unpack to more than this is taken for a bomb."""

Progress = Callable[[str, int, int], None]
"""Called with an archive's name, the bytes of it that have arrived, and its size in bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DownloadConfig:
    """What to take of RAVDESS, and where to put it."""

    target: str = "ser-ray-out/ravdess"
    """Local folder that gets one folder an archive; give it to `prepare` as the corpus."""
    parts: tuple[Part, ...] = ("speech",)
    """speech and song are the wavs of all actors (0.2 GB each); video-speech and video-song the
    mp4s with and without sound, one archive an actor (about 0.5 GB each)."""
    actors: tuple[int, ...] = ACTORS
    """Actors whose video is taken, 1 to 24."""
    keep_archives: bool = False
    """Leave the zip files in the target after unpacking them."""
    record_url: str = "https://zenodo.org/api/records/1188976"
    """The record's listing: names, sizes, checksums and links of the archives."""

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise ConfigError(f"parts holds {part!r}: it takes {', '.join(PARTS)}")
        for actor in self.actors:
            if actor not in ACTORS:
                raise ConfigError(f"actors holds {actor}: RAVDESS has actors 1 to 24")
        if "://" in self.target:
            raise ConfigError(f"target is {self.target}: it must be a folder on this machine")
        if not self.record_url.startswith(("https://", "http://")):
            raise ConfigError(f"record_url is {self.record_url!r}: it must be an http(s) address")
        if not self.archive_names:
            raise ConfigError(
                f"parts {self.parts} of actors {self.actors} are no archive at all: name a part of "
                "each, and mind that actor 18 has no song"
            )

    @property
    def archive_names(self) -> tuple[str, ...]:
        """File names in the record, each once."""
        names: list[str] = []
        for part in self.parts:
            channel = "Song" if part.endswith("song") else "Speech"
            if part in ("speech", "song"):
                names.append(f"Audio_{channel}_Actors_01-24.zip")
                continue
            names += [
                f"Video_{channel}_Actor_{actor:02d}.zip"
                for actor in self.actors
                if channel == "Speech" or actor not in ACTORS_WITHOUT_SONG
            ]
        return tuple(dict.fromkeys(names))


def download(config: DownloadConfig, progress: Progress | None = None) -> tuple[Path, ...]:
    """Fetch, check and unpack what is not there yet.

    Args:
        config: what and where.
        progress: called for every chunk that arrives; without it a bar is shown on a terminal and
            plain lines elsewhere.

    Returns:
        The folders of the archives asked for, all of them finished.

    Raises:
        CorpusError: the record cannot be read, lacks an archive, or sends something else than it
            lists; the disk is too small; or a folder is in the way. What has arrived is kept.
    """
    from ser_ray.corpus.unpack import is_unpacked

    target = Path(config.target).expanduser()
    folders = {name: target / Path(name).stem for name in config.archive_names}
    missing = {name: folder for name, folder in folders.items() if not is_unpacked(folder)}
    for folder in missing.values():
        _require_absent(folder)
    if missing:
        try:
            target.mkdir(parents=True, exist_ok=True)
            with _only_writer(target), _shown(progress) as progress:
                _bring(missing, target, config, progress)
        except OSError as error:
            raise CorpusError(
                f"{target}: cannot be written ({error}); make room or choose another target, and "
                "the same command goes on from what has arrived"
            ) from error
    return tuple(folders.values())


def _bring(
    missing: Mapping[str, Path], target: Path, config: DownloadConfig, progress: Progress
) -> None:
    """Fetch and unpack archives, one after the other, into the folders given by their names."""
    from ser_ray.corpus import fetch
    from ser_ray.corpus.unpack import unpack

    with fetch.open_session() as session:
        archives = fetch.list_record(session, config.record_url, list(missing))
        _require_space(archives, target, keep_archives=config.keep_archives)
        for archive in archives:
            path = fetch.fetch(session, archive, target, progress)
            unpack(path, missing[archive.name], max_bytes=_MAX_GROWTH * archive.size)
            if not config.keep_archives:
                path.unlink()


@contextlib.contextmanager
def _only_writer(target: Path) -> Iterator[None]:
    """Hold a lock on the target that ends with the process, however it ends."""
    import fcntl  # not on Windows, where the rest of this module is imported too

    with (target / ".download.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CorpusError(
                f"{target}: another ser-ray download is writing here; wait for its end, or choose "
                "another target"
            ) from None
        yield


def _require_absent(folder: Path) -> None:
    if folder.exists():
        raise CorpusError(
            f"{folder}: is there already and was not unpacked by ser-ray, so it may be incomplete; "
            "move it away, choose another target, or leave this part out if the folder is whole"
        )


def _require_space(archives: "list[Archive]", target: Path, *, keep_archives: bool) -> None:
    """Check that what will come fits on the disk, beside the zip files while they are needed."""
    sizes = [archive.size for archive in archives]
    unpacked = sum(archive.size * _GROWTH[archive.name[:5]] for archive in archives)
    here = sum(file.stat().st_size for archive in archives for file in archive.files_in(target))
    needed = round(unpacked) + (sum(sizes) if keep_archives else max(sizes)) - here
    free = shutil.disk_usage(target).free
    if needed > free:
        raise CorpusError(
            f"{target}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; make "
            "room, choose another target, or take fewer parts or actors"
        )


@contextlib.contextmanager
def _shown(progress: Progress | None) -> Iterator[Progress]:
    """Yield the function to call with the progress: the given one, or one that shows it."""
    if progress is not None:
        yield progress
        return
    started: dict[str, tuple[float, int]] = {}
    with show_progress() as report:

        def show(name: str, done: int, total: int) -> None:
            now = time.monotonic()
            since, before = started.setdefault(name, (now, done))
            text = f"{name}: {done / 1e6:.1f} of {total / 1e6:.1f} MB"
            if now > since and done > before:
                rate = (done - before) / (now - since)
                left = timedelta(seconds=round((total - done) / rate))
                text += f", {rate / 1e6:.1f} MB/s, {left} left"
            report(text, done, total)

        yield show
