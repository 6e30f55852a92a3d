"""Finds the recordings in a folder, or among the files that match a pattern.

`prepare` and `predict` use the same rules, so they find the same recordings in a folder. The suffix
of a file decides. If other kinds of files have this suffix too, the first bytes of the file decide.
A file that is given by its path may have any suffix, and so may files that match a pattern with
this suffix, such as `*.dat`.
"""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from pyarrow import fs

from ser_ray.errors import CorpusError
from ser_ray.storage.listing import ListedFile, find_local, list_files
from ser_ray.storage.paths import NOT_UTF8, absolute, as_utf8, filesystem_of

AUDIO_SUFFIXES = frozenset(
    (
        ".wav", ".wave", ".bwf", ".rf64", ".w64", ".aif", ".aiff", ".aifc", ".au", ".caf", ".sph",
        ".nist", ".ac3", ".ape", ".eac3", ".flv", ".tta", ".wv", ".flac", ".mp3", ".mp2", ".mp1",
        ".mpa", ".mpga", ".aac", ".adts", ".amr", ".awb", ".ogg", ".oga", ".ogx", ".opus", ".spx",
        ".wma", ".m4a", ".m4b", ".m4p", ".m4r", ".mp4", ".m4v", ".3ga", ".3gp", ".3gpp", ".3g2",
        ".3gpp2", ".mov", ".qt", ".f4a", ".f4v", ".mka", ".mkv", ".weba", ".webm", ".ogv", ".avi",
        ".asf", ".wmv", ".mpg", ".mpeg", ".vob", ".m2ts", ".m2t",
    )
)  # fmt: skip
"""Suffixes of the audio and video files that phones, recorders, cameras and editors write."""
SHARED_SUFFIXES = frozenset({".ts", ".mts", ".mod", ".snd", ".voc"})
"""Suffixes of recordings and of other files, as `.ts` is also the suffix of TypeScript. The first
bytes of the file decide."""
_FIRST_BYTES = (b"\x00\x00\x01\xba", b".snd", b"FORM", b"RIFF", b"Creative Voice File")
_PACKETS = ((0, 188), (4, 192))
"""The two kinds of packets of MPEG transport streams: the position of the byte "G" in a packet, and
the number of bytes in a packet."""


@dataclass(frozen=True)
class AudioFiles:
    """The recordings in the files, folders and patterns that a user gave."""

    files: list[str] = field(default_factory=list)
    """Paths or URIs. A file that is given in several spellings, such as `a.wav` and `./a.wav`, is
    listed once, in the first of them."""
    problems: dict[str, str] = field(default_factory=dict)
    """{path: reason} of the files that cannot be opened."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Number of files that are not recordings, by suffix."""


def suffix_of(name: str) -> str:
    """Return the suffix of a file name in lower case, with its dot; empty if there is none."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - called for each file


def is_recording(file: ListedFile) -> bool:
    """Return whether a listed file is a recording, by its suffix or its first bytes."""
    suffix = suffix_of(file.inside)
    if suffix not in SHARED_SUFFIXES or file.problem is not None:
        return suffix in AUDIO_SUFFIXES
    try:
        filesystem, path = filesystem_of(file.location)
        with filesystem.open_input_file(path) as stream:
            start = stream.read(2 * max(length for _, length in _PACKETS))
    except OSError:
        return True  # decoding the file will give the reason
    return start.startswith(_FIRST_BYTES) or any(
        start[offset::length][:2] == b"GG" for offset, length in _PACKETS
    )


def describe_left_out(left_out: Counter[str]) -> str:
    """Describe how many files were left out, by suffix; return an empty string for no files."""
    if not left_out:
        return ""
    ranked = sorted(left_out.items(), key=lambda item: (-item[1], item[0] or "~"))
    kinds = [f"{count} {suffix or 'without suffix'}" for suffix, count in ranked[:8]]
    if rest := sum(count for _, count in ranked[8:]):
        kinds.append(f"{rest} of other kinds")
    hint = "; unpack archives to use the files in them" if ".zip" in left_out else ""
    return f"left out because of their suffixes: {', '.join(kinds)}{hint}"


def list_audio(sources: Sequence[str]) -> AudioFiles:
    """List the recordings in the files, folders and patterns that a user gave.

    Args:
        sources: files with any suffix, folders, or patterns. In a pattern, `*`, `?` and `[...]`
            match within a name, and `**` matches any number of names, also that of the file.

    Raises:
        CorpusError: no source is given, or a source does not exist, cannot be listed, or holds no
            audio or video file.
        ConfigError: as `filesystem_of`.
    """
    if not sources or "" in sources:  # an empty name would be the current folder
        raise CorpusError("no files given: give files, folders or patterns")
    found = AudioFiles()
    for source in sources:
        try:
            _add(found, source)
        except OSError as error:
            reason = error.strerror or str(error)
            raise CorpusError(
                f"{as_utf8(source)}: cannot be listed ({reason}); check its name and your access"
            ) from error
    by_path: dict[str, str] = {}
    for file in found.files:
        by_path.setdefault(absolute(file), file)
    found.files[:] = by_path.values()
    return found


def _add(found: AudioFiles, source: str) -> None:
    """Add the files of one source."""
    if as_utf8(source) != source and Path(source).is_file():
        found.files.append(as_utf8(source))
        found.problems[as_utf8(source)] = NOT_UTF8
        return
    filesystem, path = filesystem_of(source)
    if isinstance(filesystem, fs.LocalFileSystem) and not Path(path).exists():
        path = find_local(path)
        source = path if Path(path).exists() else source
    kind = filesystem.get_file_info(path).type
    if kind == fs.FileType.Directory:
        _add_matching(found, source, source, ["**"])
    elif kind != fs.FileType.NotFound:  # also a device, which decoding will report
        found.files.append(source)
    elif match := re.match(r"(?:[^*?\[]*/)?(?=[^/]*[*?\[])", source):
        folder = match[0]  # ends before the first name with a wildcard
        pattern = unicodedata.normalize("NFC", source.removeprefix(folder)).split("/")
        _add_matching(found, source, folder or ".", pattern)
    else:
        raise CorpusError(
            f"{source}: no such file or folder; check the path, and write a pattern in quotes"
        )


def _add_matching(found: AudioFiles, source: str, folder: str, pattern: Sequence[str]) -> None:
    """Add the recordings in a folder that match a pattern, and count the other files that match.

    If the pattern itself has a suffix, such as `*.dat`, all files that match are added, except
    files with one of `SHARED_SUFFIXES` that are not recordings. The items of the pattern are the
    names between its slashes; the item `**` matches any number of names.
    """
    has_suffix = re.search(r"\.\w", pattern[-1]) is not None
    added, left_out = [], Counter[str]()
    for file in list_files(folder):
        if not _matches(unicodedata.normalize("NFC", file.inside).split("/"), pattern):
            continue
        suffix = suffix_of(file.inside)
        if is_recording(file) or (has_suffix and suffix not in SHARED_SUFFIXES):
            added.append(file.location)
            if file.problem is not None:
                found.problems[file.location] = file.problem
        else:
            left_out[suffix] += 1
    if not added:
        raise CorpusError(
            f"{source}: no audio or video file "
            f"({describe_left_out(left_out) or 'nothing was found'}); `**` matches folders at any "
            "depth. Give a file with another suffix by its path, or by a pattern with this suffix, "
            "such as '*.dat'"
        )
    found.files.extend(sorted(added))
    found.left_out.update(left_out)


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not names
    if pattern[0] == "**":
        return any(_matches(names[skip:], pattern[1:]) for skip in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])
