"""Downloads RAVDESS from its Zenodo record into folders that `manifest` can list.

For each archive, `fetch` downloads the file and compares its checksum with that in the record, and
`unpack` extracts it. The extracted folder appears only when it is complete. After an interruption,
the same call resumes the download.

RAVDESS is under CC BY-NC-SA 4.0; see https://zenodo.org/records/1188976.
"""

import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from ser_ray.corpus.ravdess.names import SPEAKERS
from ser_ray.errors import ConfigError, CorpusError
from ser_ray.progress import Report, show_progress

if TYPE_CHECKING:
    from ser_ray.corpus.ravdess.fetch import Archive

Part = Literal["speech", "song", "video-speech", "video-song"]
PARTS: tuple[Part, ...] = get_args(Part)
ACTORS = tuple(map(int, SPEAKERS))

# Unpacked bytes per byte of an archive, with a margin: 208 MB of speech become 514 MB of wav.
_GROWTH = {"Audio": 2.6, "Video": 1.05}
_MAX_GROWTH = 10
"""An archive is refused as a zip bomb if its files have more than this many times as many bytes as
the archive itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DownloadConfig:
    """Which parts of RAVDESS to download, and where to put them."""

    target: str = "ser-ray-out/ravdess"
    """Local folder to download into. Give it to `prepare` as the corpus."""
    parts: tuple[Part, ...] = ("speech",)
    """speech and song are the wav files of all actors (0.2 GB each). video-speech and video-song
    are the mp4 files, with and without sound, in one archive for each actor (about 0.5 GB each)."""
    actors: tuple[int, ...] = ACTORS
    """Actors whose videos are downloaded, 1 to 24."""
    keep_archives: bool = False
    """Keep the zip files in the target after unpacking them."""
    record_url: str = "https://zenodo.org/api/records/1188976"
    """Address of the record, which lists names, sizes, checksums and links of the archives."""

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise ConfigError(f"parts has {part!r}: it must be one of {', '.join(PARTS)}")
        for actor in self.actors:
            if actor not in ACTORS:
                raise ConfigError(f"actors has {actor}: RAVDESS has actors 1 to 24")
        if "://" in self.target:
            raise ConfigError(f"target is {self.target}: it must be a folder on this machine")
        if not self.record_url.startswith(("https://", "http://")):
            raise ConfigError(f"record_url is {self.record_url!r}: it must be an http(s) address")
        if not self.archive_names:
            raise ConfigError(
                f"parts is {self.parts} and actors is {self.actors}: no archive matches both; give "
                "at least one part and, for videos, one actor; actor 18 has no song"
            )

    @property
    def archive_names(self) -> tuple[str, ...]:
        """Names of the archives to download, without repetition."""
        names: list[str] = []
        for part in self.parts:
            channel = "Song" if part.endswith("song") else "Speech"
            if part.startswith("video"):
                actors = [a for a in self.actors if (channel, a) != ("Song", 18)]  # 18 did not sing
                names += [f"Video_{channel}_Actor_{actor:02d}.zip" for actor in actors]
            else:
                names.append(f"Audio_{channel}_Actors_01-24.zip")
        return tuple(dict.fromkeys(names))


def download(config: DownloadConfig, progress: Report | None = None) -> tuple[Path, ...]:
    """Download, check and unpack the archives that are not unpacked yet.

    Args:
        config: which archives to download, and where to put them.
        progress: called with a text, the number of downloaded megabytes of an archive, and its
            size in megabytes; by default progress is shown on standard error.

    Returns:
        The complete folders of the requested archives.

    Raises:
        CorpusError: the record cannot be read, or does not list an archive. An archive cannot be
            downloaded or unpacked, or has the wrong checksum. The target cannot be written, its
            disk is too small, or another process downloads into it. The folder of an archive
            exists, but was not made by `unpack`. Downloaded bytes are kept unless their checksum is
            wrong.
    """
    from ser_ray.corpus.ravdess import fetch
    from ser_ray.corpus.ravdess.unpack import is_unpacked, unpack
    from ser_ray.storage.lock import FolderLock
    from ser_ray.storage.paths import absolute

    target = Path(absolute(config.target))
    folders = {name: target / Path(name).stem for name in config.archive_names}
    missing = {name: folder for name, folder in folders.items() if not is_unpacked(folder)}
    for folder in filter(Path.exists, missing.values()):
        raise CorpusError(
            f"{folder}: exists already and was not unpacked by ser-ray, so it may be incomplete; "
            "move it away, choose another target, or leave out this part if the folder is complete"
        )
    if missing:
        try:
            lock = FolderLock(
                str(target),
                CorpusError,
                activity="is downloading into this folder",
                advice="wait until it ends, or choose another target",
            )
            with lock, fetch.open_session() as session:
                archives = fetch.list_record(session, config.record_url, list(missing))
                _require_space(archives, target, keep_archives=config.keep_archives)
                for archive in archives:
                    with show_progress("MB", progress) as report:
                        path = fetch.fetch(session, archive, target, report)
                    unpack(path, missing[archive.name], max_bytes=_MAX_GROWTH * archive.size)
                    if not config.keep_archives:
                        path.unlink()
        except OSError as error:
            raise CorpusError(
                f"{target}: cannot be written ({error}); free some space or choose another target. "
                "The same command resumes the download"
            ) from error
    return tuple(folders.values())


def _require_space(archives: "list[Archive]", target: Path, *, keep_archives: bool) -> None:
    """Raise a CorpusError unless the disk has room for the unpacked files and for the archives.

    If the archives are not kept, only one of them is on the disk at a time.
    """
    sizes = [archive.size for archive in archives]
    unpacked = sum(archive.size * _GROWTH[archive.name[:5]] for archive in archives)
    files = itertools.chain(*(target.glob(f"{archive.name}*") for archive in archives))
    present = sum(file.stat().st_size for file in files)  # complete, or incomplete as NAME.part
    needed = round(unpacked) + (sum(sizes) if keep_archives else max(sizes)) - present
    free = shutil.disk_usage(target).free
    if needed > free:
        raise CorpusError(
            f"{target}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; free "
            "some space, choose another target, or select fewer parts or actors"
        )
