"""cluster.yaml, as Ray's own launcher understands it and as far as its commands run here."""

import copy
import os
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
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
from ser_ray.cluster import cpus_per_worker, has_gpus, require_shared, require_workers
from ser_ray.errors import ResourcesError
from ser_ray.training.config import RunConfig
from ser_ray.training.search_config import SlotConfig
from ser_ray.training.trials import find_slots

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


def test_its_setup_installs_what_is_installed_here_and_asks_for_the_token(edited, tmp_path):
    """The commands themselves, in a home of their own; nothing is downloaded."""
    fetch_uv, install, protect, remember = edited["setup_commands"]
    uv = Path(sys.executable).with_name("uv")
    assert f"/uv/{version('uv')}/" in fetch_uv
    (tmp_path / "ser-ray").symlink_to(ROOT)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("a token")

    def run(command: str) -> str:
        bash = ["bash", "-c", command]
        env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
        done = subprocess.run(bash, env=env, check=True, capture_output=True, text=True)
        return done.stdout + done.stderr

    for found, here in (
        ("~/.local/bin/uv", f"{uv} --offline"),
        ("~/venv/bin/python", sys.executable),
    ):
        assert found in install
        install = install.replace(found, here)
    assert "Would make no changes" in run(f"{install} --dry-run")
    run(protect)
    assert stat.S_IMODE((tmp_path / ".ray" / "auth_token").stat().st_mode) == 0o600
    run(remember)
    run(remember)  # as `ray up` does on every change
    assert (tmp_path / ".bashrc").read_text().count("export") == 1
    told = run(". ~/.bashrc; echo $RAY_AUTH_MODE $MLFLOW_TRACKING_URI; which -a python | head -1")
    assert told.split()[:2] == ["token", "http://127.0.0.1:5000"]


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What Ray knows of: a head that `ray up` started, and no other machine yet."""
    known = [{"Alive": True, "NodeID": "head", "Labels": {}, "Resources": {"memory": 1.0}}]
    monkeypatch.setattr("ray.nodes", lambda: known)
    monkeypatch.setattr(cluster, "AUTOSCALER_CONFIG", tmp_path / "bootstrap.yaml")
    return known


def test_what_an_autoscaler_may_start_counts_as_reachable(edited, nodes, tmp_path):
    """A head without CPUs, all workers gone home: jobs must not be refused."""
    assert not has_gpus()
    with pytest.raises(ResourcesError, match="2 workers need 2 GPUs, the cluster has 0"):
        require_workers(2, cpus=1, gpus=1)
    (tmp_path / "bootstrap.yaml").write_text(yaml.safe_dump(edited))
    gpu = edited["available_node_types"]["gpu-worker"]["resources"]
    for _ in range(2):  # with none of them there, and with one
        assert has_gpus()
        require_workers(8, cpus=1, gpus=1)
        with pytest.raises(ResourcesError, match="9 workers need 9 GPUs, the cluster has 8"):
            require_workers(9, cpus=1, gpus=1)
        assert [cpus_per_worker(workers) for workers in (1, 16, 17, 40, 999)] == [16, 16, 8, 8, 1]
        assert find_slots(RunConfig(), SlotConfig(gpus_per_worker=0.25)).count == 8 * 4
        label = {"ray.io/node-group": "gpu-worker"}
        nodes.append({"Alive": True, "NodeID": "new", "Labels": label, "Resources": gpu})


def test_a_path_on_the_heads_own_disk_is_refused_before_there_are_others(
    edited, nodes, tmp_path, monkeypatch
):
    context = SimpleNamespace(get_node_id=lambda: "head", runtime_env={})
    monkeypatch.setattr("ray.get_runtime_context", lambda: context)
    require_shared("/etc")  # a machine for itself
    (tmp_path / "bootstrap.yaml").write_text(yaml.safe_dump(edited))
    with pytest.raises(ResourcesError, match="/etc: is on this machine, but not on the machines"):
        require_shared("s3://bucket/folder", "/etc")
    require_shared("s3://bucket/folder", "/dev/shm")  # mounted, as shared folders are
