"""Unpacks an untrusted zip file into a folder that appears only when it is complete.

All names, file types and sizes are checked before the first byte is written. An archive cannot lie
about a size, because `zipfile` reads no more bytes of a member than the declared size.
"""

import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from ser_ray.errors import CorpusError

MARKER = ".unpacked-by-ser-ray"
MAX_MEMBERS = 20_000
"""Far more than the 1,440 files of the largest archive of RAVDESS."""
_ENCRYPTED = 0x1  # flag bit 0 (APPNOTE.TXT, 4.4.4)


def is_unpacked(folder: Path) -> bool:
    """Return whether `unpack` made this folder."""
    return (folder / MARKER).is_file()


def unpack(archive: Path, folder: Path, *, max_bytes: int) -> None:
    """Unpack a zip file into a folder that does not exist yet.

    Args:
        archive: the zip file.
        folder: the folder to create. It also gets a marker file, which `is_unpacked` looks for.
        max_bytes: limit for the total size of all members.

    Raises:
        CorpusError: the archive is broken or hostile, or the disk is full. No unpacked
            file remains.
    """
    temporary = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    try:
        with zipfile.ZipFile(archive) as opened:
            members = _checked_members(opened, archive.name, max_bytes)
            for member in members:
                path = temporary.joinpath(*PurePosixPath(member.filename).parts)
                path.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(member) as source, path.open("xb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
        (temporary / MARKER).write_text(f"all of {archive.name}\n")
        temporary.replace(folder)
    # zipfile raises these errors for broken members, unknown compressions and invalid names.
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
        raise CorpusError(
            f"{archive}: cannot be unpacked ({error}); delete it to download it again, or free "
            "some space if the disk is full"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _checked_members(opened: zipfile.ZipFile, name: str, max_bytes: int) -> list[zipfile.ZipInfo]:
    """Return the files in the archive.

    Raises:
        CorpusError: the archive cannot be unpacked safely.
    """
    infos = opened.infolist()
    members = [info for info in infos if not info.is_dir()]
    if not 1 <= len(members) <= MAX_MEMBERS:
        raise CorpusError(f"{name}: has {len(members)} files; 1 to {MAX_MEMBERS} are expected")
    for info in infos:
        if problem := _why_unsafe(info):
            raise CorpusError(f"{name}: {info.filename!r} {problem}; nothing was unpacked")
    total = sum(info.file_size for info in members)
    if total > max_bytes:
        raise CorpusError(
            f"{name}: its files have {total / 1e6:.0f} MB, but at most {max_bytes / 1e6:.0f} MB "
            "are plausible for an archive of this size; nothing was unpacked"
        )
    return members


def _why_unsafe(info: zipfile.ZipInfo) -> str:
    """Return why a member must not be unpacked, or an empty string if it is safe."""
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
