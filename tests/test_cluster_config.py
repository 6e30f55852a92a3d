"""cluster.yaml, as Ray's own launcher understands it and as far as its commands run here."""

import copy
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws
from packaging.requirements import Requirement
from ray.autoscaler._private.aws import config as aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config

from ser_ray import cluster
from ser_ray.cluster import has_gpus, require_workers
from ser_ray.errors import ResourcesError

ROOT = Path(__file__).parents[1]
EDITS = {"us-east-1": "eu-central-1", "key_name: ser-ray": "key_name: mine", "my-bucket": "ours"}


@pytest.fixture(scope="module")
def edited() -> dict[str, Any]:
    """The file after a user's three edits, one replacement each."""
    text = (ROOT / "cluster.yaml").read_text()
    for number, (old, new) in enumerate(EDITS.items(), start=1):
        code = [line for line in text.splitlines() if old in line.partition("#")[0]]
        assert len(code) == 1, f"{old} is in {len(code)} places"
        assert f"EDIT {number}" in text
        text = text.replace(old, new)
    return yaml.safe_load(text)


@pytest.fixture
def resolved(
    edited: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, Any]]:
    """What `ray up` makes of it in an account with a default network, and nothing else."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    with mock_aws():
        config = prepare_config(copy.deepcopy(edited))
        validate_config(config)
        yield aws.bootstrap_aws(config)


def test_ray_accepts_it_and_fills_in_the_account(resolved, tmp_path):
    kinds = resolved["available_node_types"]
    assert {name: kind["resources"] for name, kind in kinds.items()} == {
        "head": {"CPU": 0},
        "cpu-worker": {"CPU": 16},
        "gpu-worker": {"CPU": 8, "GPU": 1},
    }
    assert {name: kind["min_workers"] for name, kind in kinds.items()} == dict.fromkeys(kinds, 0)
    for name, kind in kinds.items():
        node = kind["node_config"]
        assert node["KeyName"] == "mine"
        assert node["SubnetIds"]
        assert node["IamInstanceProfile"] == {"Name": "ser-ray"}
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert ("InstanceMarketOptions" in node) == (name != "head")
    assert resolved["auth"]["ssh_private_key"] == str(tmp_path / ".ssh" / "mine.pem")
    assert resolved["idle_timeout_minutes"] <= 10


def test_nothing_but_ssh_is_open(resolved):
    ec2 = boto3.client("ec2", resolved["provider"]["region"])
    used = {
        group
        for kind in resolved["available_node_types"].values()
        for group in kind["node_config"]["SecurityGroupIds"]
    }
    rules = [
        rule
        for group in ec2.describe_security_groups(GroupIds=list(used))["SecurityGroups"]
        for rule in group["IpPermissions"]
    ]
    from_outside = [rule for rule in rules if rule["IpRanges"] or rule.get("Ipv6Ranges")]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in from_outside] == [(22, 22)]
    starts = " ".join(resolved["head_start_ray_commands"] + resolved["worker_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in starts
    assert "0.0.0.0" not in starts
    assert starts.count("ray start") == starts.count("RAY_AUTH_MODE=token") == 2


def test_its_machines_are_ones_that_ec2_would_start(resolved):
    """The launcher's own call, against a stand-in that checks the parameters' names and types."""
    provider = AWSNodeProvider(resolved["provider"], resolved["cluster_name"])
    for name, kind in resolved["available_node_types"].items():
        node = kind["node_config"] | {"ImageId": "ami-0123456789abcdef0"}
        node.pop("IamInstanceProfile")  # an account's own, which the stand-in has not
        assert provider.create_node(node, {"ray-user-node-type": name}, 1)


def test_the_role_may_be_passed_on_and_reaches_one_bucket():
    class Template(yaml.SafeLoader):
        """CloudFormation's tags as plain strings."""

    Template.add_multi_constructor("!", lambda loader, _, node: loader.construct_scalar(node))
    resources = yaml.load((ROOT / ".aws-role.yaml").read_text(), Template)["Resources"]
    policy = resources["Role"]["Properties"]["Policies"][0]["PolicyDocument"]["Statement"]
    by_service: dict[str, set[str]] = {}
    for statement in policy:
        actions = statement["Action"]
        for action in [actions] if isinstance(actions, str) else actions:
            by_service.setdefault(action.split(":")[0], set()).add(statement["Resource"])
    assert set(by_service) == {"ec2", "ssm", "iam", "s3"}
    assert by_service["iam"] == {"arn:aws:iam::${AWS::AccountId}:role/ser-ray"}
    assert by_service["s3"] == {"arn:aws:s3:::${Bucket}", "arn:aws:s3:::${Bucket}/*"}


def test_what_is_shipped_exists_and_the_pinned_versions_are_what_is_installed(edited):
    mounts = edited["file_mounts"]
    assert mounts.pop("~/.ray/auth_token") == "~/.ray/auth_token"
    assert all((ROOT / source).exists() for source in mounts.values())
    install = next(command for command in edited["setup_commands"] if "pip install" in command)
    assert "--requirements ~/ser-ray/pyproject.toml --extra cluster" in install
    project = tomllib.loads((ROOT / mounts["~/ser-ray/pyproject.toml"]).read_text())["project"]
    pins = project["dependencies"] + project["optional-dependencies"]["cluster"]
    for pin in pins:
        requirement = Requirement(pin)
        assert str(requirement.specifier) == f"=={version(requirement.name)}"


def test_what_an_autoscaler_may_start_counts_as_reachable(edited, tmp_path, monkeypatch):
    """A head without CPUs, all workers gone home: jobs must not be refused."""
    monkeypatch.setattr("ray.cluster_resources", lambda: {"memory": 1.0})
    monkeypatch.setattr(cluster, "AUTOSCALER_CONFIG", tmp_path / "bootstrap.yaml")
    assert not has_gpus()
    with pytest.raises(ResourcesError, match="2 workers need 2 GPUs, the cluster has 0"):
        require_workers(2, cpus=1, gpus=1)
    (tmp_path / "bootstrap.yaml").write_text(yaml.safe_dump(edited))
    assert has_gpus()
    require_workers(8, cpus=1, gpus=1)
    with pytest.raises(ResourcesError, match="9 workers need 9 GPUs, the cluster has 8"):
        require_workers(9, cpus=1, gpus=1)
