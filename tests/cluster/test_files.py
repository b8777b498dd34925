"""The cluster files against Ray's own reading of them, Kubernetes' schemas, and what they must not do."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

from benchmarks.cluster_cost import PRICES
from lemon.curate.config import CurateConfig
from lemon.pretrain.config import PretrainConfig
from lemon.runtime.config import Frozen, load
from lemon.sweep.config import SweepConfig

FOLDER = Path(__file__).resolve().parents[2] / "cluster"
README = (FOLDER / "README.md").read_text()
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
    for kind in ("cpu", "gpu", "train"):
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


def test_the_image_is_that_of_the_pinned_ray_and_nodes_install_only_what_differs_from_it(aws: dict[str, Any]) -> None:
    dockerfile = (FOLDER / "Dockerfile").read_text()
    assert dockerfile.count(f"rayproject/ray:{RAY}-py311") == 1
    (wanted,) = re.findall(r"-c constraints.txt -e ('\S+')", dockerfile)
    installs = [command for command in aws["head_setup_commands"] + aws["worker_setup_commands"] if "pip" in command]
    assert installs
    for command in installs:
        check, install = command.split("||")
        assert all(f"cmp {name} ~/installed/{name}" in check for name in ("constraints.txt", "pyproject.toml"))
        assert install.split() == ["pip", "install", "-q", "-c", "constraints.txt", "-e", wanted]
    assert "cp pyproject.toml constraints.txt ~/installed" in dockerfile


def test_the_package_installs_from_the_files_that_the_image_copies_before_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("editables", reason="hatchling wants it for pip install -e; make setup installs it")
    import hatchling.build

    before = (FOLDER / "Dockerfile").read_text().split("RUN mkdir conf")[0]
    for words in re.findall(r"^COPY --chown=\S+ (.+)$", before, re.MULTILINE):
        *sources, target = words.split()
        for source in sources:
            place = tmp_path / target / Path(source).name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(FOLDER.parent / source, place)
    (tmp_path / "conf").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hatchling.build.build_editable(str(tmp_path / "dist")).endswith(".whl")


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
    scripts = sorted(FOLDER.rglob("*.sh"))
    assert len(scripts) == 3
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)


def test_the_node_types_are_those_that_have_prices_with_as_many_cpus_as_ray_is_told(aws: dict[str, Any]) -> None:
    priced = yaml.safe_load(PRICES.read_text())["nodes"]
    assert aws["available_node_types"]["head"]["node_config"]["InstanceType"] == priced["head"]["type"]
    for name, node in workers_of(aws).items():
        kind = priced[name.split("_")[0]]
        assert (node["node_config"]["InstanceType"], node["resources"]["CPU"]) == (kind["type"], kind["cpus"])


def test_a_node_types_cpus_and_cards_are_those_of_its_instance(aws: dict[str, Any]) -> None:
    moto = pytest.importorskip("moto", reason="moto has AWS's list of instances; make setup installs it")
    with gzip.open(Path(moto.__file__).parent / "ec2" / "resources" / "instance_types.json.gz") as stream:
        instances = json.load(stream)
    for node in workers_of(aws).values():
        instance = instances[node["node_config"]["InstanceType"]]
        cards = sum(card["Count"] for card in instance.get("GpuInfo", {}).get("Gpus", []))
        has = {"CPU": instance["VCpuInfo"]["DefaultVCpus"]} | ({"GPU": cards} if cards else {})
        assert node["resources"] == has


def test_the_quotas_to_ask_for_let_every_node_type_grow_to_its_limit(aws: dict[str, Any]) -> None:
    quotas = {code: int(count) for code, count in re.findall(r"\| (L-[0-9A-F]{8}) \| (\d+) \|", README)}
    codes = {  # of EC2, by the first letter of the instance: on demand, spot
        "c": ("L-1216C47A", "L-34B43A08"), "m": ("L-1216C47A", "L-34B43A08"),
        "g": ("L-DB2E81BA", "L-3819A6DF"), "p": ("L-417A185B", "L-7212CCBC"),
    }  # fmt: skip
    needed = dict.fromkeys(quotas, 0)
    for name, node in aws["available_node_types"].items():
        is_spot = "InstanceMarketOptions" in node["node_config"]
        count, cpus = (1, 8) if name == "head" else (node["max_workers"], int(node["resources"]["CPU"]))
        needed[codes[node["node_config"]["InstanceType"][0]][is_spot]] += count * cpus
    assert needed == quotas


def launched(aws: dict[str, Any], each: dict[str, float], *, count: int) -> dict[str, int]:
    """Nodes that Ray's scheduler starts for so many workers."""
    types = {
        name: NodeTypeConfig(
            name,
            min_worker_nodes=0,
            max_worker_nodes=node["max_workers"],
            resources=node["resources"],
            priority=node["priority"],
        )
        for name, node in workers_of(aws).items()
    }
    requests = ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(each)] * count)
    asked = SchedulingRequest(
        disable_launch_config_check=True, node_type_configs=types, max_num_nodes=100, resource_requests=requests
    )
    reply = ResourceDemandScheduler(event_logger=None).schedule(asked)
    assert not reply.infeasible_resource_requests
    return {launch.instance_type: launch.count for launch in reply.to_launch}


def test_rays_scheduler_gives_each_job_the_cards_that_suit_it(aws: dict[str, Any]) -> None:
    assert launched(aws, {"CPU": 2}, count=300) == {"cpu_spot": 19}
    assert launched(aws, {"CPU": 6, "GPU": 1}, count=20) == {"gpu_spot": 20}
    assert launched(aws, {"CPU": 12, "GPU": 1}, count=4) == {"train_spot": 4}


# --- the commands of the README ---------------------------------------------------------------------------------------

STAGES: dict[str, type[Frozen]] = {"curate": CurateConfig, "pretrain": PretrainConfig, "scaling_sweep": SweepConfig}


def documented_jobs() -> list[tuple[str, list[str]]]:
    """Stage and words of every job of the README and of the RayJob."""
    job = (FOLDER / "kuberay-job.yaml").read_text().replace("EDIT_BUCKET", "B").replace("\n    workers", " workers")
    found = re.findall(r"python jobs/(\w+)\.py ([^\n]*(?:\n    cells[^\n]*)?)", README + job)
    return [(stage, words.split()) for stage, words in found]


def demand(stage: str, config: Any) -> tuple[int, int, float]:
    """Workers of a job, CPUs and GPUs of each."""
    if stage == "scaling_sweep":
        workers = config.pretrain["workers"]
        return config.max_concurrent, workers["cpus"], workers["gpus"]
    count = config.workers.actors if stage == "curate" else config.workers.count
    return count, config.workers.cpus, config.workers.gpus


def holds(groups: list[tuple[int, float, float]], *, cpus: int, gpus: float) -> int:
    """Workers that groups of (nodes, CPUs, GPUs) have room for; workers without a GPU stay off nodes with one."""
    fitting = [group for group in groups if bool(group[2]) == bool(gpus)]
    return sum(n * int(min(cpu // cpus, gpu // gpus if gpus else cpu)) for n, cpu, gpu in fitting)


def test_every_documented_job_is_valid_and_fits_both_clusters(aws: dict[str, Any], items: list[dict[str, Any]]) -> None:
    spot = [node for name, node in workers_of(aws).items() if name.endswith("_spot")]
    on_aws = [(node["max_workers"], node["resources"]["CPU"], node["resources"].get("GPU", 0)) for node in spot]
    read = _derive_autoscaling_config_from_ray_cr(one(items, "RayCluster"))["available_node_types"]
    groups = [read[name] for name in ("cpu", "gpu", "train")]
    in_pods = [(group["max_workers"], group["resources"]["CPU"], group["resources"].get("GPU", 0)) for group in groups]
    jobs = documented_jobs()
    assert {stage for stage, _ in jobs} == set(STAGES)
    assert len(jobs) == 5
    for stage, words in jobs:
        count, cpus, gpus = demand(stage, load(stage, words, STAGES[stage]))
        assert holds(on_aws, cpus=cpus, gpus=gpus) >= count, words
        assert holds(in_pods, cpus=cpus, gpus=gpus) >= count, words


# --- kuberay.yaml -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def items() -> list[dict[str, Any]]:
    texts = [(FOLDER / f"kuberay{name}.yaml").read_text() for name in ("-services", "", "-job")]
    return [item for text in texts for item in yaml.safe_load_all(text)]


def one(items: list[dict[str, Any]], kind: str, name: str = "") -> dict[str, Any]:
    (found,) = (item for item in items if item["kind"] == kind and item["metadata"]["name"].endswith(name))
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
    assert read["gpu"]["resources"]["GPU"] == read["train"]["resources"]["GPU"] == 1
    assert "GPU" not in read["cpu"]["resources"]
    assert all(read[group]["min_workers"] == 0 < read[group]["max_workers"] for group in ("cpu", "gpu", "train"))


def test_kubernetes_shows_nothing_to_the_outside_and_asks_for_a_token(items: list[dict[str, Any]]) -> None:
    cluster = one(items, "RayCluster")["spec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == RAY
    services = [item["spec"]["type"] for item in items if item["kind"] == "Service"]
    assert {cluster["headGroupSpec"]["serviceType"], *services} == {"ClusterIP"}
    policies = [item["spec"] for item in items if item["kind"] == "NetworkPolicy"]
    assert all(rule["from"] for policy in policies for rule in policy.get("ingress", []))  # an empty list lets all in
    policy = one(items, "NetworkPolicy", "lemon")["spec"]
    assert policy["podSelector"]["matchLabels"] == {"ray.io/cluster": one(items, "RayCluster")["metadata"]["name"]}
    (job,) = one(items, "RayJob")["spec"]["submitterPodTemplate"]["metadata"]["labels"].items()
    assert {"podSelector": {"matchLabels": dict([job])}} in [
        peer for rule in policy["ingress"] for peer in rule["from"]
    ]


def test_every_pod_of_kubernetes_has_shared_memory_and_the_tracking_server(items: list[dict[str, Any]]) -> None:
    service = one(items, "Service", "mlflow")
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


def test_what_outlives_the_cluster_is_selected_by_its_services_and_kept_from_others(
    items: list[dict[str, Any]],
) -> None:
    deployed = {item["metadata"]["name"]: item["spec"]["template"] for item in items if item["kind"] == "Deployment"}
    for service in (item for item in items if item["kind"] == "Service"):
        template = deployed[service["metadata"]["name"]]
        assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
        ports = [port["containerPort"] for box in template["spec"]["containers"] for port in box["ports"]]
        assert [port["port"] for port in service["spec"]["ports"]] == ports
    kept = [item["spec"]["podSelector"]["matchLabels"] for item in items if item["kind"] == "NetworkPolicy"]
    assert all(template["metadata"]["labels"] in kept for template in deployed.values())
    backup = one(items, "CronJob")["spec"]["jobTemplate"]["spec"]["template"]
    rule = one(items, "NetworkPolicy", "postgres")["spec"]["ingress"][0]["from"][0]["podSelector"]["matchExpressions"][
        0
    ]
    assert backup["metadata"]["labels"]["lemon"] in rule["values"]
    server = one(items, "Deployment", "mlflow")["spec"]["template"]["spec"]["containers"][0]
    assert "--backend-store-uri=postgresql+psycopg2://mlflow@lemon-postgres:5432/mlflow" in server["args"]
    assert not [item["metadata"]["name"] for item in items if "password:" in yaml.safe_dump(item)]  # only references
