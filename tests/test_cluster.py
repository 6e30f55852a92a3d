"""What a user is told when there is no Ray to work on; Ray itself stands aside."""

import pytest
import ray

from ser_ray.cluster import cluster
from ser_ray.errors import ResourcesError


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (ConnectionError("refused"), r"no Ray cluster answers at .* start it with `ray start"),
        (Exception("timed out"), r"did not start on this machine \(timed out\): it is too busy"),
    ],
)
def test_ray_that_does_not_start_is_told(
    failure: Exception, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: object) -> None:
        raise failure

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ResourcesError, match=told), cluster("127.0.0.1:1"):
        pytest.fail("it is not connected")


def test_a_bug_is_not_taken_for_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise TypeError("no such option")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(TypeError, match="no such option"), cluster():
        pytest.fail("it is not connected")
