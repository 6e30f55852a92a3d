"""A zip file from elsewhere becomes a folder, whole or not at all.

Nothing in the archive is trusted: every name, kind and size is checked before the first byte is
written, a member never yields more than its declared size, and the folder gets its name last.
"""

import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from ser_ray.errors import CorpusError

MARKER = ".unpacked-by-ser-ray"
MAX_MEMBERS = 20_000
"""RAVDESS's largest archive holds 1,440 files."""
_ENCRYPTED = 0x1  # flag bit 0 (APPNOTE.TXT, 4.4.4)


def is_unpacked(folder: Path) -> bool:
    """Whether a folder is what `unpack` made of an archive."""
    return (folder / MARKER).is_file()


def unpack(archive: Path, folder: Path, *, max_bytes: int) -> None:
    """Unpack a zip file into a folder that does not exist yet.

    Args:
        archive: the zip file.
        folder: created, with a marker file that says it is finished.
        max_bytes: what the members may come to.

    Raises:
        CorpusError: the archive is broken or hostile, or the disk is full; nothing is left behind.
    """
    workshop = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(workshop, ignore_errors=True)  # of a run that was killed
    try:
        with zipfile.ZipFile(archive) as opened:
            members = _checked_members(opened, archive.name, max_bytes)
            _require_space(members, archive)
            for member in members:
                path = workshop.joinpath(*PurePosixPath(member.filename).parts)
                path.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(member) as source, path.open("xb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
        (workshop / MARKER).write_text(f"all of {archive.name}\n")
        workshop.replace(folder)
    # What zipfile raises for broken members, unknown compressions and names no disk takes.
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
        raise CorpusError(
            f"{archive}: cannot be unpacked ({error}); delete it to download it again, or make "
            "room if the disk is full"
        ) from error
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def _checked_members(opened: zipfile.ZipFile, name: str, max_bytes: int) -> list[zipfile.ZipInfo]:
    """Return the files in the archive if all of it may be unpacked."""
    infos = opened.infolist()
    members = [info for info in infos if not info.is_dir()]
    if not members or len(infos) > MAX_MEMBERS:
        raise CorpusError(f"{name}: holds {len(members)} files; 1 to {MAX_MEMBERS} are expected")
    for info in infos:
        problem = _problem(info)
        if problem:
            raise CorpusError(f"{name}: {info.filename!r} {problem}; nothing of it was unpacked")
    total = sum(info.file_size for info in members)
    if total > max_bytes:
        raise CorpusError(
            f"{name}: would unpack to {total / 1e6:.0f} MB, more than the {max_bytes / 1e6:.0f} MB "
            "that can be right; nothing of it was unpacked"
        )
    return members


def _problem(info: zipfile.ZipInfo) -> str:
    """Say in words why a member may not be unpacked, or nothing."""
    path = PurePosixPath(info.filename)
    kind = stat.S_IFMT(info.external_attr >> 16)
    is_plain = path.parts and not path.is_absolute() and ".." not in path.parts
    if not is_plain or "\\" in info.filename or ":" in info.filename:  # C:\ on Windows
        return "points outside the archive"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device"
    if info.flag_bits & _ENCRYPTED:
        return "is encrypted"
    return ""


def _require_space(members: list[zipfile.ZipInfo], archive: Path) -> None:
    needed = sum(member.file_size for member in members)
    free = shutil.disk_usage(archive.parent).free
    if needed > free:
        raise CorpusError(
            f"{archive}: unpacks to {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; make "
            "room and give the same command again"
        )
