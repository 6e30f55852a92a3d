"""The manifests for KubeRay, against cluster.yaml and against what reads them.

Kubernetes' own schema comes with `kubernetes-validate`. That of KubeRay's kinds is in no package
registry, so the fields that the manifests may use are listed here, after the Go types of KubeRay
1.7 (ray-operator/apis/ray/v1), which its schema is generated from.
"""

import json
import shlex
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)

from ser_ray.cli.main import main

ROOT = Path(__file__).parents[2]
KUBERNETES = "1.37"


def an_object(required: str = "", **properties: Any) -> dict[str, Any]:
    """Schema of an object with these fields and no others."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required.split(),
        "properties": properties,
    }


TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
GROUP = {
    "rayStartParams": TEXTS,
    "resources": TEXTS,
    "labels": TEXTS,
    "template": an_object("spec", spec={}),
}
CLUSTER = an_object(
    "headGroupSpec",
    rayVersion=TEXT,
    authOptions=an_object(mode={"enum": ["disabled", "token"]}, secretName=TEXT),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=an_object(idleTimeoutSeconds=COUNT, version={"enum": ["v1", "v2"]}),
    headGroupSpec=an_object("template", **GROUP),
    workerGroupSpecs={
        "type": "array",
        "items": an_object(
            "groupName minReplicas maxReplicas template",
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            **GROUP,
        ),
    },
)
JOB = an_object(
    clusterSelector=TEXTS,
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
)
KINDS = {"RayCluster": CLUSTER, "RayJob": JOB}


@pytest.fixture(scope="module")
def manifests() -> dict[str, dict[str, Any]]:
    """All documents, by kind."""
    texts = [(ROOT / ".kuberay" / name).read_text() for name in ("cluster.yaml", "job.yaml")]
    documents = [document for text in texts for document in yaml.safe_load_all(text)]
    assert len({document["kind"] for document in documents}) == len(documents)
    return {document["kind"]: document for document in documents}


@pytest.fixture(scope="module")
def pods(manifests) -> dict[str, dict[str, Any]]:
    """What runs in the head and in a worker of each group."""
    spec = manifests["RayCluster"]["spec"]
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    groups["head"] = spec["headGroupSpec"]
    return {name: group["template"]["spec"] for name, group in groups.items()}


def test_every_field_is_one_that_its_reader_knows(manifests, pods):
    for kind, manifest in manifests.items():
        if kind in KINDS:
            assert manifest["apiVersion"] == "ray.io/v1"
            jsonschema.validate(manifest["spec"], KINDS[kind])
        else:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    for name, spec in pods.items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_ray_would_start_the_machines_of_cluster_yaml(manifests):
    """By the code with which Ray's autoscaler reads a RayCluster."""
    cluster = manifests["RayCluster"]
    placed = cluster | {"metadata": cluster["metadata"] | {"namespace": "default"}}
    ours = _derive_autoscaling_config_from_ray_cr(placed)
    aws = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    assert ours["idle_timeout_minutes"] == aws["idle_timeout_minutes"]

    def sizes(kinds: dict[str, Any]) -> dict[str, Any]:
        return {
            name: (
                kind.get("max_workers", 0),
                {k: kind["resources"].get(k, 0) for k in ("CPU", "GPU")},
            )
            for name, kind in kinds.items()
        }

    found, wanted = sizes(ours["available_node_types"]), sizes(aws["available_node_types"])
    assert found.pop("headgroup") == wanted.pop("head")
    assert found == wanted
    reach = yaml.safe_load(manifests["ConfigMap"]["data"]["ray_bootstrap_config.yaml"])
    assert sizes(reach["available_node_types"]) == wanted


def test_the_parts_name_each_other(manifests, pods):
    cluster = manifests["RayCluster"]
    label = {"ray.io/cluster": cluster["metadata"]["name"]}
    assert manifests["RayJob"]["spec"]["clusterSelector"] == label
    assert manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == label
    account = manifests["ServiceAccount"]["metadata"]["name"]
    assert {spec["serviceAccountName"] for spec in pods.values()} == {account}
    assert {"configMap": {"name": manifests["ConfigMap"]["metadata"]["name"]}}.items() <= next(
        volume for volume in pods["head"]["volumes"] if volume["name"] == "reach"
    ).items()
    for spec in pods.values():
        mounted = {mount["name"] for item in spec["containers"] for mount in item["volumeMounts"]}
        assert mounted <= {volume["name"] for volume in spec["volumes"]}
    assert len({item["image"] for spec in pods.values() for item in spec["containers"]}) == 1


def test_the_image_has_the_pinned_versions(manifests):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    constraints = ".ci/constraints.txt"
    version = manifests["RayCluster"]["spec"]["rayVersion"]
    assert f"ray=={version}" in (ROOT / constraints).read_text().splitlines()
    lines = (ROOT / ".kuberay" / "Dockerfile").read_text().splitlines()
    assert f"FROM rayproject/ray:{version}-py312" in lines
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]]
    needed = {
        "pyproject.toml",
        constraints,
        "ser_ray",
        project["readme"],
        *project["license-files"],
    }
    assert set(copied) == needed
    assert any("pip install" in line and "--constraint ser-ray/" in line for line in lines)


def test_it_is_as_protected_as_the_cluster_on_machines(manifests, pods):
    assert manifests["RayCluster"]["spec"]["authOptions"] == {"mode": "token"}
    assert "Secret" not in manifests
    aws = (ROOT / "cluster.yaml").read_text()
    for spec in pods.values():
        assert spec["securityContext"]["runAsNonRoot"]
        for container in spec["containers"]:
            assert not container["securityContext"]["allowPrivilegeEscalation"]
    mlflow = pods["head"]["containers"][1]
    assert " ".join(mlflow["command"][1:]) in aws  # listens on the loopback, asks for a password
    assert "ports" not in mlflow


def test_the_role_is_one_that_pods_may_take(manifests):
    """Not that of the machines; the policy in the manifest's head names the pods' own account."""
    account = manifests["ServiceAccount"]["metadata"]
    (role,) = account["annotations"].values()
    assert f"RoleName: {role.rpartition('/')[2]}\n" not in (ROOT / ".aws-role.yaml").read_text()
    head = (ROOT / ".kuberay" / "cluster.yaml").read_text().partition("\napiVersion")[0]
    policy = "".join(line[3:] for line in head.splitlines() if line.startswith("#   "))
    (statement,) = json.loads(policy[policy.index("{") :])["Statement"]
    assert statement["Action"] == "sts:AssumeRoleWithWebIdentity"
    names = statement["Condition"]["StringEquals"]
    (subject,) = (name for key, name in names.items() if key.endswith(":sub"))
    assert subject == f"system:serviceaccount:default:{account['name']}"


def test_the_commands_of_the_readme_name_what_there_is(manifests):
    readme = (ROOT / "jobs" / "README.md").read_text()
    cluster = manifests["RayCluster"]["metadata"]["name"]
    assert f"kubectl get secret {cluster} " in readme
    assert f"ray.io/cluster={cluster},ray.io/node-type=head" in readme
    head = manifests["RayCluster"]["spec"]["headGroupSpec"]["template"]["spec"]
    (mount,) = head["containers"][1]["volumeMounts"]
    assert f"--container ray -- cat {mount['mountPath']}/credentials" in readme


def test_the_job_is_one_that_the_program_understands(manifests, capsys):
    program, *arguments = shlex.split(manifests["RayJob"]["spec"]["entrypoint"])
    assert program == "ser-ray"
    assert main([*arguments, "--dry-run"]) == 0
