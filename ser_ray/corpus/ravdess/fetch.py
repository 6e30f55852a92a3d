"""Fetches files of a Zenodo record over HTTP, and resumes interrupted transfers.

Received bytes are kept in `NAME.part`. After a lost connection, a busy server or an interrupted
run, only the missing bytes are requested. (The library `pooch` would start from the beginning.) The
number of attempts and the pauses between them are limited. The file gets its final name only if its
checksum is the one in the record.
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
from ser_ray.progress import Report

ATTEMPTS = 8
FIRST_WAIT_SECONDS = 1.0
"""Pause after the first failed attempt; each further pause is twice as long as the one before."""
MAX_WAIT_SECONDS = 60.0
TIMEOUT_SECONDS = (10.0, 60.0)
"""Longest wait for a connection, and for the next bytes of an open connection."""
BUSY = (429, 500, 502, 503, 504)
"""HTTP statuses after which the request is repeated."""
CHUNK_BYTES = 1 << 14
"""Small, because an incomplete chunk is lost and must be requested again."""

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Archive:
    """A file of the record."""

    name: str
    size: int
    """Bytes."""
    md5: str
    """32 hex digits."""
    url: str


def open_session() -> requests.Session:
    """Open a session, which reuses connections."""
    session = requests.Session()
    session.headers["Accept-Encoding"] = "identity"  # compressed transfers cannot be resumed
    return session


def list_record(session: requests.Session, url: str, names: Sequence[str]) -> list[Archive]:
    """Read the record's listing and return the named files, in the order of `names`.

    Raises:
        CorpusError: the record cannot be read, or does not list one of the names.
    """

    def request() -> str:
        with session.get(url, timeout=TIMEOUT_SECONDS) as response:
            _require_ok(response, "the record")
            return response.text

    text = _retry(f"the record {url}", request)
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
            f"{url}: the response is not the listing of a Zenodo record ({type(error).__name__}: "
            f"{error}); check the address, and whether a proxy sent the response"
        ) from error
    absent = [name for name in names if name not in listed]
    if absent:
        raise CorpusError(
            f"{url}: the record does not list {', '.join(absent)}; it lists {', '.join(listed)}"
        )
    return [listed[name] for name in names]


def fetch(session: requests.Session, archive: Archive, folder: Path, report: Report) -> Path:
    """Download an archive, or the rest of a partial download, into a folder; return its path.

    If the download has the wrong checksum, it is deleted, and repeated once from the start.

    Raises:
        CorpusError: the server does not have the archive or does not respond, both downloads have
            the wrong checksum, or the folder already has another file with the archive's name.
    """
    complete, part = folder / archive.name, folder / f"{archive.name}.part"
    if complete.is_file():
        if _md5(complete) == archive.md5:
            return complete
        raise CorpusError(
            f"{complete}: is not the file that the record lists (MD5 {archive.md5}); delete it to "
            "download it again"
        )
    for _ in range(2):
        _retry(archive.name, lambda: _fetch_rest(session, archive, part, report))
        if _md5(part) == archive.md5:
            return part.replace(complete)
        logger.warning("%s: wrong checksum, so the download is deleted", archive.name)
        part.unlink()
    raise CorpusError(
        f"{archive.name}: was downloaded twice from {archive.url}, and both times its checksum was "
        f"not that of the record (MD5 {archive.md5}); try again later, or tell the record's authors"
    )


def _fetch_rest(session: requests.Session, archive: Archive, part: Path, report: Report) -> None:
    """Request the bytes that the file `part` lacks, and append them to it.

    Raises:
        requests.RequestException: some bytes did not arrive; the received bytes are kept.
    """
    done = part.stat().st_size if part.exists() else 0
    if done >= archive.size:  # `fetch` checks the checksum
        return
    headers = {"Range": f"bytes={done}-"} if done else {}
    with session.get(
        archive.url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS
    ) as response:
        _require_ok(response, archive.name)
        resumes = response.headers.get("Content-Range", "").startswith(f"bytes {done}-")
        if not resumes:  # no range was requested, or the server ignored it
            done = 0
        with part.open("ab" if resumes else "wb") as file:
            for chunk in response.iter_content(CHUNK_BYTES):
                file.write(chunk)
                done += len(chunk)
                megabytes = done / 1e6, archive.size / 1e6
                report(f"{archive.name}: {megabytes[0]:.1f} of {megabytes[1]:.1f} MB", *megabytes)
                if done > archive.size:
                    return
    if done < archive.size:
        raise requests.ConnectionError(f"the transfer ended after {done} of {archive.size} bytes")


def _retry(name: str, request: Callable[[], Result]) -> Result:
    """Make a request. If it fails, repeat it after growing pauses, up to `ATTEMPTS` attempts."""
    attempt = 1
    while True:
        try:
            return request()
        except requests.RequestException as error:
            if attempt == ATTEMPTS:
                raise CorpusError(
                    f"{name}: failed {ATTEMPTS} times ({_reason(error)}); downloaded bytes are "
                    "kept, so the same command resumes where it stopped"
                ) from error
            seconds = _pause(attempt, error.response)
            logger.warning("%s: %s; trying again in %.0f s", name, _reason(error), seconds)
            time.sleep(seconds)
            attempt += 1


def _reason(error: BaseException) -> str:
    """Return the message of the innermost exception; the outer ones only repeat it with the URL."""
    while error.args:
        inner = getattr(error.args[0], "reason", error.args[0])
        if not isinstance(inner, BaseException):
            break
        error = inner
    return str(error).rpartition("): ")[2]


def _pause(attempt: int, response: requests.Response | None) -> float:
    """Return the seconds until the next attempt; the server may ask for them with Retry-After."""
    requested = response.headers.get("Retry-After", "") if response is not None else ""
    seconds = float(requested) if requested.isdecimal() else FIRST_WAIT_SECONDS * 2 ** (attempt - 1)
    return min(seconds, MAX_WAIT_SECONDS)


def _require_ok(response: requests.Response, name: str) -> None:
    if response.status_code in BUSY:
        response.raise_for_status()
    if response.status_code not in (200, 206):
        raise CorpusError(
            f"{name}: {response.url} returned {response.status_code} {response.reason}; check the "
            "record's address, and whether the record still exists and has this file"
        )


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
