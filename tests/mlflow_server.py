"""A real MLflow server that tests stop and start."""

import sys
from contextlib import ExitStack
from pathlib import Path

import requests

from tests.processes import started

SECONDS = 60
"""Longest wait for one answer, on a machine that is busy with other tests."""


def is_ready(uri: str, auth: tuple[str, str] | None = None) -> bool:
    """Whether a server answers from its database, which it opens at the first such request."""
    url = f"{uri}/api/2.0/mlflow/experiments/search"
    answer = requests.post(url, json={"max_results": 1}, auth=auth, timeout=SECONDS)
    return answer.ok


class MlflowServer:
    """`mlflow server` on a fixed port; its database is kept while it is stopped."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.uri = folder, f"http://127.0.0.1:{port}"
        database, artifacts = f"sqlite:///{folder}/server.db", f"{folder}/artifacts"
        self._command = [
            *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--backend-store-uri", database, "--artifacts-destination", artifacts),
        ]
        self._running: ExitStack | None = None

    def start(self) -> None:
        """Start it, unless it runs, and wait until it answers."""
        if self._running is None:
            log = self.folder / "server.log"
            self._running = ExitStack()
            self._running.enter_context(started(self._command, log, lambda: is_ready(self.uri)))

    def stop(self) -> None:
        """Kill it and its workers, if it runs."""
        if self._running is not None:
            self._running.close()
            self._running = None
