"""Files of a Zenodo record over HTTP: listed, fetched with resume, checked.

A connection may be cut, a server busy, a partial file left by an earlier run: what has arrived is
kept in `NAME.part` and asked for no more, every wait and every number of attempts is bounded, and
nothing is believed before it has the checksum that the record lists.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import requests

from ser_ray.errors import CorpusError

ATTEMPTS = 8
FIRST_WAIT_SECONDS = 1.0
"""Doubled after every failed attempt."""
MAX_WAIT_SECONDS = 60.0
TIMEOUT_SECONDS = (10.0, 60.0)
"""For a connection, and for the next bytes on it."""
BUSY = (429, 500, 502, 503, 504)
"""Answers after which the same question is worth asking again."""
CHUNK_BYTES = 1 << 14
"""Small, because a chunk that is cut off in the middle is lost and has to be asked for again."""

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Archive:
    """A file of the record, as its listing describes it."""

    name: str
    size: int
    """Bytes."""
    md5: str
    """32 hex digits."""
    url: str

    def files_in(self, folder: Path) -> list[Path]:
        """What there is of it in a folder: nothing, the whole or a part."""
        paths = (folder / self.name, self.part_in(folder))
        return [path for path in paths if path.is_file()]

    def part_in(self, folder: Path) -> Path:
        """Where it grows until it is whole."""
        return folder / f"{self.name}.part"


def open_session() -> requests.Session:
    """Open connections that are kept between requests."""
    session = requests.Session()
    # Bytes as they lie on the server: a compressed transfer could not be resumed.
    session.headers["Accept-Encoding"] = "identity"
    return session


def list_record(session: requests.Session, url: str, names: Sequence[str]) -> list[Archive]:
    """Read the record's listing and return the named files, in the order of `names`.

    Raises:
        CorpusError: the record does not answer, its answer is no listing, or a name is not in it.
    """

    def ask() -> str:
        with session.get(url, timeout=TIMEOUT_SECONDS) as response:
            _require_ok(response, "the record")
            return response.text

    text = _retry(f"the record {url}", ask)
    try:
        listed = {
            item["key"]: Archive(
                item["key"],
                int(item["size"]),
                item["checksum"].removeprefix("md5:"),
                item["links"]["self"],
            )
            for item in json.loads(text)["files"]
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorpusError(
            f"{url}: the answer is no listing of a Zenodo record ({type(error).__name__}: "
            f"{error}); check the address, and whether a proxy answers in its place"
        ) from error
    absent = [name for name in names if name not in listed]
    if absent:
        raise CorpusError(
            f"{url}: the record does not list {', '.join(absent)}; it lists {', '.join(listed)}"
        )
    return [listed[name] for name in names]


def fetch(
    session: requests.Session,
    archive: Archive,
    folder: Path,
    report: Callable[[str, int, int], None],
) -> Path:
    """Bring an archive into a folder, going on from what is there, and return its path.

    A partial file whose whole turns out wrong is deleted and fetched once more from the start.

    Raises:
        CorpusError: it is not on the server, the server stays away, or what it sends has another
            checksum than the record lists.
    """
    whole, part = folder / archive.name, archive.part_in(folder)
    if whole.is_file():
        if _md5(whole) == archive.md5:
            return whole
        raise CorpusError(
            f"{whole}: is not the file that the record lists (MD5 {archive.md5}); delete it, and "
            "it will be downloaded"
        )
    for _ in range(2):
        _retry(archive.name, lambda: _go_on(session, archive, part, report))
        if _md5(part) == archive.md5:
            return part.replace(whole)
        logger.warning("%s: wrong checksum, starting over", archive.name)
        part.unlink()
    raise CorpusError(
        f"{archive.name}: {archive.url} sent it twice with another checksum than the record lists "
        f"(MD5 {archive.md5}); try again later, and if it stays so tell the record's authors"
    )


def _go_on(
    session: requests.Session,
    archive: Archive,
    part: Path,
    report: Callable[[str, int, int], None],
) -> None:
    """Ask for the bytes that are not there yet, until all are.

    Raises:
        requests.RequestException: try again; what came is kept.
    """
    done = part.stat().st_size if part.exists() else 0
    if done >= archive.size:  # its checksum will tell
        part.touch()
        return
    headers = {"Range": f"bytes={done}-"} if done else {}
    with session.get(
        archive.url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS
    ) as response:
        _require_ok(response, archive.name)
        starts_here = response.headers.get("Content-Range", "").startswith(f"bytes {done}-")
        if not starts_here:  # the server sends all of it, whatever it was asked for
            done = 0
        with part.open("ab" if starts_here else "wb") as file:
            for chunk in response.iter_content(CHUNK_BYTES):
                file.write(chunk)
                done += len(chunk)
                report(archive.name, done, archive.size)
                if done > archive.size:
                    return
    if done < archive.size:
        raise requests.ConnectionError(f"ended after {done} of {archive.size} bytes")


def _retry(name: str, ask: Callable[[], Answer]) -> Answer:
    """Ask until there is an answer, with growing pauses, a bounded number of times."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return ask()
        except requests.RequestException as error:
            if attempt == ATTEMPTS:
                raise CorpusError(
                    f"{name}: given up after {ATTEMPTS} attempts ({_reason(error)}); what has "
                    "arrived is kept, and the same command goes on from there"
                ) from error
            seconds = _pause(attempt, error.response)
            logger.warning("%s: %s; trying again in %.0f s", name, _reason(error), seconds)
            time.sleep(seconds)
    raise AssertionError("unreachable")


def _reason(error: BaseException) -> str:
    """What went wrong at the bottom; the layers above repeat the address and each other."""
    while error.args:
        inner = getattr(error.args[0], "reason", error.args[0])
        if not isinstance(inner, BaseException):
            break
        error = inner
    return str(error).rpartition("): ")[2]


def _pause(attempt: int, response: requests.Response | None) -> float:
    """Seconds before the next attempt: what the server asks for, else doubling."""
    wish = response.headers.get("Retry-After", "") if response is not None else ""
    seconds = float(wish) if wish.isdecimal() else FIRST_WAIT_SECONDS * 2 ** (attempt - 1)
    return min(seconds, MAX_WAIT_SECONDS)


def _require_ok(response: requests.Response, name: str) -> None:
    if response.status_code in BUSY:
        response.raise_for_status()
    if response.status_code not in (200, 206):
        raise CorpusError(
            f"{name}: {response.url} answers {response.status_code} {response.reason}; check the "
            "record's address, and whether the record still holds it"
        )


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
