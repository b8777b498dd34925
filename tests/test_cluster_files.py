"""The cluster files against Ray's own reading of them, Kubernetes' schemas, and what they must not do."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from benchmarks import cluster_cost

FOLDER = Path(__file__).resolve().parents[1] / "cluster"
RAY = re.search(r"^ray==(.+)$", (FOLDER.parent / "constraints.txt").read_text(), re.MULTILINE)[1]  # type: ignore[index]

# Fields of KubeRay 1.5 (its API reference, types RayClusterSpec, HeadGroupSpec, WorkerGroupSpec and RayJobSpec): its
# CRDs come in no package, so what lies around the pods is held against these names.
CLUSTER_FIELDS = {
    "authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec",
    "headServiceAnnotations", "managedBy", "rayVersion", "suspend", "upgradeStrategy", "workerGroupSpecs",
}  # fmt: skip
HEAD_FIELDS = {"enableIngress", "headService", "labels", "rayStartParams", "resources", "serviceType", "template"}
WORKER_FIELDS = {
    "groupName", "idleTimeoutSeconds", "labels", "maxReplicas", "minReplicas", "numOfHosts", "rayStartParams",
    "replicas", "resources", "scaleStrategy", "suspend", "template",
}  # fmt: skip
JOB_FIELDS = {
    "activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy", "entrypoint", "entrypointNumCpus",
    "entrypointNumGpus", "entrypointResources", "jobId", "managedBy", "metadata", "rayClusterSpec", "runtimeEnvYAML",
    "shutdownAfterJobFinishes", "submissionMode", "submitterConfig", "submitterPodTemplate", "suspend",
    "ttlSecondsAfterFinished",
}  # fmt: skip


# --- aws.yaml ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def aws() -> dict[str, Any]:
    return prepare_config(yaml.safe_load((FOLDER / "aws.yaml").read_text()))


def workers_of(aws: dict[str, Any]) -> dict[str, dict[str, Any]]:
    types = aws["available_node_types"]
    return {name: types[name] for name in types if name != aws["head_node_type"]}


def number(option: str, commands: list[str]) -> list[int]:
    return [int(found) for command in commands for found in re.findall(rf"--{option}=(\d+)", command)]


def test_ray_reads_the_aws_file_and_a_misspelt_key_would_be_told(aws: dict[str, Any]) -> None:
    validate_config(aws)
    with pytest.raises(Exception, match="setup_comands"):
        validate_config({**aws, "setup_comands": []})


def test_no_task_runs_on_the_head_and_each_kind_of_worker_prefers_spot(aws: dict[str, Any]) -> None:
    head = aws["available_node_types"][aws["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    workers = workers_of(aws)
    assert any(node["resources"].get("GPU") for node in workers.values())
    for kind in ("cpu", "gpu"):
        spot, fallback = workers[f"{kind}_spot"], workers[f"{kind}_on_demand"]
        assert spot["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
        assert "InstanceMarketOptions" not in fallback["node_config"]
        assert spot["priority"] > fallback["priority"]
        assert spot["resources"] == fallback["resources"]
        assert spot["node_config"]["InstanceType"] == fallback["node_config"]["InstanceType"]
        assert spot["min_workers"] == fallback["min_workers"] == 0


def test_every_node_has_an_instance_profile_and_a_security_group_of_ours(aws: dict[str, Any]) -> None:
    """Ray's own security group lets the world in at port 22; it makes one for any node type that names none."""
    for name, node in aws["available_node_types"].items():
        config = node["node_config"]
        assert config["IamInstanceProfile"]["Name"] == ("lemon-head" if name == "head" else "lemon-worker")
        assert config["SecurityGroupIds"]
        assert config["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["DeleteOnTermination"] for disk in config["BlockDeviceMappings"])
    assert "security_group" not in aws["provider"]
    assert "0.0.0.0" not in (FOLDER / "aws.yaml").read_text() + (FOLDER / "mlflow_server.sh").read_text()


def test_the_image_is_that_of_the_pinned_ray_and_nothing_installs_another(aws: dict[str, Any]) -> None:
    assert aws["docker"]["image"].split(":")[1].startswith(f"{RAY}-py311")
    assert (FOLDER / "Dockerfile").read_text().count(f"rayproject/ray:{RAY}-py311") == 1
    for command in aws["head_setup_commands"] + aws["worker_setup_commands"]:
        assert "-c constraints.txt" in command
        assert "http" not in command


def test_the_object_store_fits_into_shared_memory(aws: dict[str, Any]) -> None:
    (size,) = re.findall(r"--shm-size=(\d+)g", " ".join(aws["docker"]["run_options"]))
    stores = number("object-store-memory", aws["head_start_ray_commands"] + aws["worker_start_ray_commands"])
    assert len(stores) == 2
    assert max(stores) < int(size) << 30


def test_jobs_start_in_the_repository_with_a_token_and_a_tracking_server(aws: dict[str, Any]) -> None:
    (repository,) = (remote for remote, local in aws["file_mounts"].items() if local == ".")
    options = aws["docker"]["run_options"]
    assert f"--workdir={repository}" in options
    assert "-e RAY_AUTH_MODE=token" in options
    (token,) = re.findall(r"RAY_AUTH_TOKEN_PATH=(\S+)", " ".join(options))
    assert str(Path(token).parent) in aws["file_mounts"]
    for starts in (aws["head_start_ray_commands"], aws["worker_start_ray_commands"]):
        (start,) = (command for command in starts if "ray start" in command)
        assert start.startswith(f"cd {repository} && ")
        assert start.index("MLFLOW_TRACKING_URI" if "address" in start else "mlflow_server.sh") < start.index(
            "ray start"
        )
    assert "--dashboard-host=127.0.0.1" in " ".join(aws["head_start_ray_commands"])


def test_shell_scripts_are_read_by_bash() -> None:
    subprocess.run(["bash", "-n", FOLDER / "mlflow_server.sh"], check=True)


# --- kuberay.yaml -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def items() -> list[dict[str, Any]]:
    texts = [(FOLDER / name).read_text() for name in ("kuberay.yaml", "kuberay-job.yaml")]
    return [item for text in texts for item in yaml.safe_load_all(text)]


def one(items: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = (item for item in items if item["kind"] == kind)
    return found


def pods(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The templates of all pods: of the head, of the groups, of the job's submitter."""
    spec = one(items, "RayCluster")["spec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [*(group["template"] for group in groups), one(items, "RayJob")["spec"]["submitterPodTemplate"]]


def test_plain_objects_and_every_pod_follow_the_schemas_of_kubernetes(items: list[dict[str, Any]]) -> None:
    plain = [item for item in items if not item["apiVersion"].startswith("ray.io/")]
    made = [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod["spec"]} for pod in pods(items)]
    for item in [*plain, *made]:
        kubernetes_validate.validate(item, "1.33", strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**made[0], "spec": {**made[0]["spec"], "volume": []}}, "1.33", strict=True)


def test_fields_around_the_pods_are_those_of_kuberay(items: list[dict[str, Any]]) -> None:
    cluster, job = one(items, "RayCluster")["spec"], one(items, "RayJob")["spec"]
    assert cluster.keys() <= CLUSTER_FIELDS
    assert cluster["headGroupSpec"].keys() <= HEAD_FIELDS
    for group in cluster["workerGroupSpecs"]:
        assert (
            {"groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"} <= group.keys() <= WORKER_FIELDS
        )
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    assert job.keys() <= JOB_FIELDS
    assert job["clusterSelector"] == {"ray.io/cluster": one(items, "RayCluster")["metadata"]["name"]}
    assert "shutdownAfterJobFinishes" not in job  # KubeRay refuses it beside a clusterSelector
    assert isinstance(yaml.safe_load(job["runtimeEnvYAML"]), dict)


def test_rays_autoscaler_reads_the_groups_of_the_kuberay_file(items: list[dict[str, Any]]) -> None:
    read = _derive_autoscaling_config_from_ray_cr(one(items, "RayCluster"))["available_node_types"]
    assert read["headgroup"]["resources"]["CPU"] == 0
    assert read["gpu"]["resources"]["GPU"] == 4
    assert "GPU" not in read["cpu"]["resources"]
    assert all(read[group]["min_workers"] == 0 < read[group]["max_workers"] for group in ("cpu", "gpu"))


def test_kubernetes_shows_nothing_to_the_outside_and_asks_for_a_token(items: list[dict[str, Any]]) -> None:
    cluster = one(items, "RayCluster")["spec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == RAY
    assert cluster["headGroupSpec"]["serviceType"] == one(items, "Service")["spec"]["type"] == "ClusterIP"
    policy = one(items, "NetworkPolicy")["spec"]
    assert policy["podSelector"]["matchLabels"] == {"ray.io/cluster": one(items, "RayCluster")["metadata"]["name"]}
    assert all(rule["from"] for rule in policy["ingress"])  # an empty list would let all in
    (job,) = one(items, "RayJob")["spec"]["submitterPodTemplate"]["metadata"]["labels"].items()
    assert {"podSelector": {"matchLabels": dict([job])}} in [
        peer for rule in policy["ingress"] for peer in rule["from"]
    ]


def test_every_pod_of_kubernetes_has_shared_memory_and_the_tracking_server(items: list[dict[str, Any]]) -> None:
    service = one(items, "Service")
    uri = f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    for pod in pods(items)[:-1]:  # all but the submitter, in which nothing of LEMON runs
        container = pod["spec"]["containers"][0]
        assert {"name": "MLFLOW_TRACKING_URI", "value": uri} in container["env"]
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        (volume,) = (volume for volume in pod["spec"]["volumes"] if volume["name"] == "shm")
        assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}
    spec = one(items, "RayCluster")["spec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    assert all(int(group["rayStartParams"]["object-store-memory"]) < 8 << 30 for group in groups)


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_costs_grow_with_the_work_and_have_no_price_unless_one_is_given() -> None:
    words = ["--gpu-tflops=100", "--slides=10000", "--images=1e8"]
    small = cluster_cost.estimate(cluster_cost.parse(words))
    doubled = ["--slides=20000", "--images=2e8", "--cpu-price=2", "--gpu-price=5"]
    large = cluster_cost.estimate(cluster_cost.parse([*words, *doubled]))
    for less, more in zip(small, large, strict=True):
        assert more.hours == pytest.approx(2 * less.hours)
        assert str(less).endswith("-")
        assert more.price is not None
        assert str(more).endswith(f"${more.node_hours * more.price:,.0f}")
