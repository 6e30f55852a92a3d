"""cluster.yaml, as Ray's own launcher understands it and as far as its commands run here."""

import copy
import os
import shutil
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
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

from ser_ray.cluster import connect, resources
from ser_ray.cluster.resources import cpus_per_worker, has_gpus, require_workers
from ser_ray.cluster.shared_files import require_shared
from ser_ray.distributed.run_config import RunConfig
from ser_ray.errors import ResourcesError
from ser_ray.search.config import SlotConfig
from ser_ray.search.slots import find_slots

ROOT = Path(__file__).parents[2]
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
    """The launcher's own call, against a simulated EC2 that checks parameters' names and types."""
    provider = AWSNodeProvider(resolved["provider"], resolved["cluster_name"])
    for name, kind in resolved["available_node_types"].items():
        node = kind["node_config"] | {"ImageId": "ami-0123456789abcdef0"}
        node.pop("IamInstanceProfile")  # it belongs to an account, and the simulated one has none
        assert provider.create_node(node, {"ray-user-node-type": name}, 1)


@pytest.fixture(scope="module")
def template() -> dict[str, Any]:
    """The resources of .aws-role.yaml."""

    class Template(yaml.SafeLoader):
        """CloudFormation's tags as plain strings."""

    Template.add_multi_constructor("!", lambda loader, _, node: loader.construct_scalar(node))
    return yaml.load((ROOT / ".aws-role.yaml").read_text(), Template)["Resources"]


def test_the_role_may_be_passed_on_and_reaches_one_bucket(template):
    policy = template["Role"]["Properties"]["Policies"][0]["PolicyDocument"]["Statement"]
    by_service: dict[str, set[str]] = {}
    conditions: dict[str, Any] = {}
    for statement in policy:
        actions = statement["Action"]
        for action in [actions] if isinstance(actions, str) else actions:
            service = action if action.startswith("iam:") else action.split(":")[0]
            by_service.setdefault(service, set()).add(statement["Resource"])
            conditions[action] = statement.get("Condition")
    account = "arn:aws:iam::${AWS::AccountId}:role"
    assert by_service.pop("s3") == {"arn:aws:s3:::${Bucket}", "arn:aws:s3:::${Bucket}/*"}
    assert by_service.pop("iam:PassRole") == {f"{account}/ser-ray"}
    # Without it the first request for a spot machine in an account fails.
    create, spot = "iam:CreateServiceLinkedRole", "spot.amazonaws.com"
    assert by_service.pop(create) == {f"{account}/aws-service-role/{spot}/*"}
    assert conditions[create] == {"StringEquals": {"iam:AWSServiceName": spot}}
    assert set(by_service) == {"ec2", "ssm"}


def test_the_bucket_does_not_keep_for_long_what_is_overwritten_or_half_uploaded(template):
    bucket = template["Storage"]["Properties"]
    assert bucket["VersioningConfiguration"] == {"Status": "Enabled"}
    (rule,) = bucket["LifecycleConfiguration"]["Rules"]
    assert "Prefix" not in rule  # holds for everything
    assert rule["NoncurrentVersionExpiration"]["NoncurrentDays"] <= 7
    assert rule["ExpiredObjectDeleteMarker"]
    assert rule["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] <= 7


def test_what_is_shipped_exists_and_the_pinned_versions_are_what_is_installed(edited):
    mounts = edited["file_mounts"]
    assert mounts.pop("~/.ray/auth_token") == "~/.ray/auth_token"
    assert all((ROOT / source).exists() for source in mounts.values())
    install = next(command for command in edited["setup_commands"] if "pip install" in command)
    assert "--requirements ~/ser-ray/pyproject.toml --extra cluster" in install
    assert "--constraints ~/ser-ray/constraints.txt" in install
    constraints = ROOT / mounts["~/ser-ray/constraints.txt"]
    pins = {pin.name: pin.specifier for pin in map(Requirement, constraints.read_text().split())}
    project = tomllib.loads((ROOT / mounts["~/ser-ray/pyproject.toml"]).read_text())["project"]
    extras = project["optional-dependencies"].values()
    for bounds in map(Requirement, [*project["dependencies"], *chain.from_iterable(extras)]):
        if bounds.name != "ser-ray":
            installed = version(bounds.name)
            assert str(pins[bounds.name]) == f"=={installed}"
            assert installed in bounds.specifier


@dataclass
class Machine:
    """A separate home directory with what `ray up` ships, for setup commands without a network."""

    home: Path

    def run(self, command: str) -> str:
        uv = Path(sys.executable).with_name("uv")
        for found, here in (
            ("~/.local/bin/uv", f"{uv} --offline"),
            ("~/venv/bin/python", sys.executable),
        ):
            command = command.replace(found, here)
        env = {"HOME": str(self.home), "PATH": os.environ["PATH"]}
        bash = ["bash", "-c", command]
        done = subprocess.run(bash, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture
def machine(edited: dict[str, Any], tmp_path: Path) -> Machine:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("a token")
    (tmp_path / "ser-ray").mkdir()
    for place, source in edited["file_mounts"].items():
        if place.startswith("~/ser-ray/"):
            copy_of = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
            copy_of(ROOT / source, tmp_path / place.removeprefix("~/"))
    return Machine(tmp_path)


def test_its_setup_installs_what_is_installed_here_and_asks_for_the_token(edited, machine):
    fetch_uv, install, _, protect, remember = edited["setup_commands"]
    assert f"/uv/{version('uv')}/" in fetch_uv
    assert "Would make no changes" in machine.run(f"{install} --dry-run")
    machine.run(protect)
    assert stat.S_IMODE((machine.home / ".ray" / "auth_token").stat().st_mode) == 0o600
    machine.run(remember)
    machine.run(remember)  # as `ray up` does on every change
    assert (machine.home / ".bashrc").read_text().count("export") == 1
    printed = machine.run(
        ". ~/.bashrc; echo $RAY_AUTH_MODE $MLFLOW_TRACKING_URI; which -a python | head -1"
    )
    assert printed.split()[:2] == ["token", "http://127.0.0.1:5000"]


def test_what_is_shipped_is_all_that_the_command_is_made_of(edited, machine):
    pytest.importorskip("setuptools", "77")  # else uv would fetch it
    _, _, install, *_ = edited["setup_commands"]
    machine.run(f"{install} --no-build-isolation --target ~/installed")
    assert "--shards" in machine.run(
        "PYTHONPATH=~/installed ~/installed/bin/ser-ray prepare --help"
    )


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What Ray knows of: a head that `ray up` started, and no other machine yet."""
    known = [{"Alive": True, "NodeID": "head", "Labels": {}, "Resources": {"memory": 1.0}}]
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.nodes", lambda: known)
    monkeypatch.setattr(resources, "AUTOSCALER_CONFIG", tmp_path / "bootstrap.yaml")
    return known


def test_what_an_autoscaler_may_start_counts_as_reachable(edited, nodes, tmp_path):
    """A head without CPUs, all workers gone home: jobs must not be refused."""
    assert not has_gpus()
    with pytest.raises(ResourcesError, match="2 workers need 2 GPUs, but the cluster has 0"):
        require_workers(2, cpus=1, gpus=1)
    (tmp_path / "bootstrap.yaml").write_text(yaml.safe_dump(edited))
    gpu = edited["available_node_types"]["gpu-worker"]["resources"]
    for _ in range(2):  # with none of them there, and with one
        assert has_gpus()
        require_workers(8, cpus=1, gpus=1)
        with pytest.raises(ResourcesError, match="9 workers need 9 GPUs, but the cluster has 8"):
            require_workers(9, cpus=1, gpus=1)
        assert [cpus_per_worker(workers) for workers in (1, 16, 17, 40, 999)] == [16, 16, 8, 8, 1]
        assert find_slots(RunConfig(), SlotConfig(gpus_per_worker=0.25))[0] == 8 * 4
        label = {"ray.io/node-group": "gpu-worker"}
        nodes.append({"Alive": True, "NodeID": "new", "Labels": label, "Resources": gpu})


def test_a_ray_that_a_command_started_on_the_head_has_no_autoscaler(
    edited, nodes, tmp_path, monkeypatch
):
    (tmp_path / "bootstrap.yaml").write_text(yaml.safe_dump(edited))
    assert has_gpus()
    monkeypatch.setattr(connect, "_is_started_here", True)
    assert not has_gpus()


def test_a_path_on_the_heads_own_disk_is_refused_before_there_are_others(
    edited, nodes, tmp_path, monkeypatch
):
    context = SimpleNamespace(get_node_id=lambda: "head", runtime_env={})
    monkeypatch.setattr("ray.get_runtime_context", lambda: context)
    require_shared("/etc")  # a machine for itself
    (tmp_path / "bootstrap.yaml").write_text(yaml.safe_dump(edited))
    with pytest.raises(ResourcesError, match="/etc is on this machine, but not on the machines"):
        require_shared("s3://bucket/folder", "/etc")
    require_shared("s3://bucket/folder", "/dev/shm")  # mounted, as shared folders are
