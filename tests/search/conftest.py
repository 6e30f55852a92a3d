"""Shards and a Ray cluster that the tests of searches and of cross-validations share."""

import os
from collections.abc import Iterator
from unittest import mock

import pytest
import ray

from tests.conftest import make_memory_shards
from tests.s3_server import CREDENTIALS
from tests.shard_files import write_shard_files


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    memory = make_memory_shards(num_frames=26)  # as many as half a second has
    return write_shard_files(tmp_path_factory.mktemp("shards") / "shards", memory, ("mel", "mfcc"))


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    """A Ray cluster with room for two trials, whose workers have the credentials of buckets."""
    with mock.patch.dict(os.environ, CREDENTIALS):
        ray.init(
            num_cpus=2, include_dashboard=False, address="local", log_to_driver=False,
            logging_level="ERROR",
        )  # fmt: skip
    yield
    ray.shutdown()
