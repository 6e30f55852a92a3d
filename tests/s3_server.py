"""A real S3-compatible server on this machine, for tests: moto's, over HTTP."""

import contextlib
import logging
import os
from collections.abc import Iterator
from unittest import mock

import requests
from moto.server import ThreadedMotoServer
from pyarrow import fs

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}


@contextlib.contextmanager
def s3_bucket(name: str) -> Iterator[str]:
    """Run a server with one empty bucket; yield a format string from a key to its URI.

    Credentials are in the environment, as on a user's machine, and inherited by child processes.
    """
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request otherwise
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with mock.patch.dict(os.environ, CREDENTIALS):
        server.start()
        try:
            host, port = server.get_host_and_port()
            # All servers of a process share their buckets: an earlier test may have filled it.
            requests.post(f"http://{host}:{port}/moto-api/reset", timeout=60).raise_for_status()
            client = fs.S3FileSystem(
                endpoint_override=f"{host}:{port}",
                scheme="http",
                region="us-east-1",
                allow_bucket_creation=True,
                request_timeout=60,  # seconds; the default of 3 is too short where CPUs are busy
            )
            client.create_dir(name)
            query = f"endpoint_override={host}:{port}&scheme=http&region=us-east-1"
            yield f"s3://{name}/{{}}?{query}"
        finally:
            server.stop()
