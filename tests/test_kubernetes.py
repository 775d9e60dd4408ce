"""docs/kubernetes: the manifest has the fields of KubeRay's RayJob, and names what raysl has.

The names of fields are those of the custom resource definition ``rayjobs.ray.io``, version v1, of
KubeRay in August 2026 (helm-chart/kuberay-operator/crds), and of Kubernetes' PodSpec.
"""

import re
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

from raysl.config.shipped import shipped_configs
from raysl.run.nodes import Node
from raysl.run.recipe import load_run

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "kubernetes"

JOB = {
    "activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy", "entrypoint",
    "entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "jobId", "managedBy",
    "metadata", "preRunningDeadlineSeconds", "rayClusterSpec", "runtimeEnvYAML",
    "shutdownAfterJobFinishes", "submissionMode", "submitterConfig", "submitterPodTemplate",
    "suspend", "ttlSecondsAfterFinished",
}  # fmt: skip
CLUSTER = {
    "authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions",
    "headGroupSpec", "headServiceAnnotations", "managedBy", "networkPolicy", "rayVersion",
    "suspend", "tlsOptions", "upgradeStrategy", "workerGroupSpecs",
}  # fmt: skip
AUTH = {"enableK8sTokenAuth", "mode", "secretName"}
HEAD = {
    "enableIngress", "headService", "ingressOptions", "labels", "rayStartParams", "resources",
    "serviceType", "template",
}  # fmt: skip
GROUP = {
    "groupName", "idleTimeoutSeconds", "labels", "maxReplicas", "minReplicas", "numOfHosts",
    "priority", "rayStartParams", "replicas", "resources", "scaleStrategy", "suspend", "template",
}  # fmt: skip
GROUP_NEEDS = {"groupName", "maxReplicas", "minReplicas", "template"}
POD = {"containers", "volumes", "serviceAccountName", "nodeSelector", "tolerations"}
CONTAINER = {"name", "image", "env", "envFrom", "resources", "volumeMounts", "ports"}


@pytest.fixture(scope="module")
def manifest() -> Any:
    return yaml.safe_load((FOLDER / "rayjob.yaml").read_text())


@pytest.fixture
def cluster(manifest: Any) -> Any:
    return manifest["spec"]["rayClusterSpec"]


def test_is_a_ray_job_with_fields_that_there_are(manifest: Any, cluster: Any) -> None:
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
    assert re.fullmatch(r"[a-z0-9-]+", manifest["metadata"]["name"])
    assert set(manifest["spec"]) <= JOB
    assert set(cluster) <= CLUSTER
    assert set(cluster["authOptions"]) <= AUTH
    assert cluster["authOptions"]["mode"] == "token"
    assert set(cluster["headGroupSpec"]) <= HEAD
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= GROUP
        assert set(group) >= GROUP_NEEDS
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_pods_are_whole(cluster: Any) -> None:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        assert set(pod) <= POD
        (container,) = pod["containers"]
        assert set(container) <= CONTAINER
        resources = container["resources"]
        assert resources["limits"] == resources["requests"]  # else Ray counts what is not there
        assert set(resources["limits"]) <= {"cpu", "memory", "nvidia.com/gpu"}
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        assert {mount["name"] for mount in container.get("volumeMounts", [])} == volumes
    for group in groups[1:]:
        (mount,) = group["template"]["spec"]["containers"][0]["volumeMounts"]
        assert mount["mountPath"] == "/dev/shm"


def test_the_ray_is_the_one_that_raysl_needs(cluster: Any) -> None:
    (lowest,) = re.findall(r'"ray\[[^]]*\]>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert cluster["rayVersion"].startswith(f"{lowest}.")


def test_the_command_is_one_that_loads_on_the_gpus_that_are_asked_for(
    manifest: Any, cluster: Any
) -> None:
    program, script, config, *overrides = manifest["spec"]["entrypoint"].split()
    assert program == "python"
    folder = re.findall(r"^WORKDIR (\S+)$", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)
    inside = PurePosixPath(script).relative_to(*folder)
    assert (ROOT / inside).is_file()
    assert config in shipped_configs()
    run = load_run(Path(config), overrides)
    gpus = sum(
        group["replicas"] * int(pod["resources"]["limits"].get("nvidia.com/gpu", 0))
        for group in cluster["workerGroupSpecs"]
        for pod in group["template"]["spec"]["containers"]
    )
    assert run.cluster.num_train_workers == gpus == 1
    nodes = [
        Node(group["groupName"], 1.0, 0.0, "", group["labels"])
        for group in cluster["workerGroupSpecs"]
    ]
    roles = run.cluster.roles
    assert [node.name for node in roles.train_nodes(nodes)] == ["train"]
    assert [node.name for node in roles.data_nodes(nodes)] == ["views"]


def test_the_image_copies_what_there_is_and_all_that_the_package_needs() -> None:
    text = (FOLDER / "Dockerfile").read_text()
    copied = [
        word for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for word in line.split()
    ]
    assert {"pyproject.toml", "raysl", "configs", "pipelines", "README.md", "LICENSE"} == set(
        copied
    )
    assert all((ROOT / name).exists() for name in copied)
    (python,) = re.findall(r"^FROM python:3\.(\d+)-slim$", text, re.MULTILINE)
    (lowest,) = re.findall(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert int(python) >= int(lowest)
    assert re.search(r"^USER (?!root)\w+$", text, re.MULTILINE)
