"""Rights on AWS: policies that are valid and allow what the documented commands and Ray's launcher ask for, no more."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import yaml
from botocore import xform_name

from benchmarks.processes import free_ports

FOLDER = Path(__file__).resolve().parents[2] / "cluster"
POLICIES = sorted((FOLDER / "iam").glob("*.json"))
PULL = ["BatchCheckLayerAvailability", "BatchGetImage", "GetDownloadUrlForLayer"]
PUSH = [*PULL[:2], "CompleteLayerUpload", "InitiateLayerUpload", "PutImage", "UploadLayerPart"]
"""What docker push and docker pull ask of ECR, by its documentation; neither runs here."""


def policy(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / "iam" / f"{name}.json").read_text())


def actions(document: dict[str, Any]) -> set[str]:
    listed = [statement["Action"] for statement in document["Statement"]]
    return {action for each in listed for action in ([each] if isinstance(each, str) else each)}


@functools.cache
def service_model(service: str) -> Any:
    return botocore.session.get_session().get_service_model(service)


# --- the policies -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_policies_name_single_actions_that_exist_and_bound_resources_where_aws_can() -> None:
    assert [path.stem for path in POLICIES] == ["launch", "node", "operator", "trust"]
    sizes = {}
    for path in POLICIES:
        document = json.loads(path.read_text())
        assert document["Version"] == "2012-10-17"
        sizes[path.stem] = len(json.dumps(document, separators=(",", ":")))
        for action in actions(document):
            service, operation = action.split(":")
            if service != "s3" and operation != "PassRole":  # S3's actions are not named after its operations
                assert operation in service_model(service).operation_names, action
        for statement in document["Statement"]:
            assert statement["Effect"] == "Allow"
            assert "Principal" in statement or statement["Resource"]
            if statement.get("Resource") == "*":  # AWS cannot bound these
                assert all(
                    action.startswith("ec2:Describe") or action == "ecr:GetAuthorizationToken"
                    for action in actions({"Statement": [statement]})
                )
    assert sizes["launch"] + sizes["operator"] < 5120  # of a group, its inline policies together; of a role 10,240


def test_starting_tagging_and_ending_nodes_is_bound_to_the_tag_of_this_cluster() -> None:
    cluster = yaml.safe_load((FOLDER / "aws.yaml").read_text())["cluster_name"]
    for statement in policy("launch")["Statement"]:
        on_instances = "instance/*" in str(statement["Resource"])
        if on_instances:
            (condition,) = statement["Condition"]["StringEquals"].items()
            assert condition in {
                ("aws:RequestTag/ray-cluster-name", cluster),
                ("ec2:ResourceTag/ray-cluster-name", cluster),
                ("ec2:CreateAction", "RunInstances"),
            }
        assert on_instances or not actions({"Statement": [statement]}) & {"ec2:TerminateInstances", "ec2:CreateTags"}


def test_a_node_may_pull_the_image_and_use_the_bucket_and_nothing_else() -> None:
    s3 = {f"s3:{name}" for name in ("ListBucket", "GetObject", "PutObject", "DeleteObject", "AbortMultipartUpload")}
    assert actions(policy("node")) == s3 | {"ecr:GetAuthorizationToken"} | {f"ecr:{name}" for name in PULL}


def test_an_operator_may_push_the_image_and_back_up_the_runs_and_nothing_else() -> None:
    pushes = {"ecr:GetAuthorizationToken"} | {f"ecr:{name}" for name in PUSH}
    assert "aws rds create-db-snapshot" in (FOLDER / "README.md").read_text()
    assert actions(policy("operator")) == pushes | {"rds:CreateDBSnapshot"}


# --- the commands -----------------------------------------------------------------------------------------------------

OWN_COMMANDS = {("ecr", "get-login-password"), ("rds", "wait"), ("s3", "cp")}
"""Of the command line itself, not of AWS's API."""

OWN_OPTIONS = {"query", "output", "protocol", "port", "cidr", "source-group", "region"}
"""Likewise; the middle ones are short for ``--ip-permissions``."""


def documented_commands() -> Iterator[list[str]]:
    """Words of every ``aws`` command of the README and of the script."""
    text = (FOLDER / "README.md").read_text() + (FOLDER / "aws_setup.sh").read_text()
    for found in re.findall(r"(?<![\w./-])aws ([a-z0-9-]+ [a-z-]+(?:[^\n|`)]|\\\n)*)", text.replace("\\\n", " ")):
        yield shlex.split(re.sub(r"\$\(.*", "", found).replace('"$(', "").replace('"', ""), comments=True, posix=False)


@pytest.mark.slow
def test_every_documented_aws_command_is_one_of_awss_with_options_that_it_has() -> None:
    commands = list(documented_commands())
    assert len(commands) >= 25
    for service, command, *words in commands:
        if (service, command) in OWN_COMMANDS:
            continue
        model = service_model(service)
        operations = {xform_name(name, "-"): name for name in model.operation_names}
        assert command in operations, (service, command)
        members = {xform_name(name, "-") for name in model.operation_model(operations[command]).input_shape.members}
        for word in words:
            if word.startswith("--"):
                option = word[2:]
                assert {option, option.removeprefix("no-")} & (members | OWN_OPTIONS), (service, command, word)


# --- on a stand-in of AWS ---------------------------------------------------------------------------------------------


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """An account of moto's with what aws_setup.sh makes, and aws.yaml filled in."""
    moto = pytest.importorskip("moto", reason="moto stands in for AWS; make setup installs it")
    import boto3

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("HOME", str(tmp_path))
    with moto.mock_aws():
        ec2, iam = boto3.client("ec2"), boto3.client("iam")
        for role in ("lemon-head", "lemon-worker"):
            iam.create_role(RoleName=role, AssumeRolePolicyDocument=json.dumps(policy("trust")))
            iam.create_instance_profile(InstanceProfileName=role)
            iam.add_role_to_instance_profile(InstanceProfileName=role, RoleName=role)
        ec2.create_key_pair(KeyName="lemon")
        (tmp_path / ".ssh").mkdir()
        (tmp_path / ".ssh" / "lemon").touch()
        vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
        group = ec2.create_security_group(GroupName="lemon", Description="lemon", VpcId=vpc)["GroupId"]
        image = ec2.describe_images()["Images"][0]["ImageId"]
        text = (FOLDER / "aws.yaml").read_text()
        text = text.replace("ami-EDIT", image).replace("sg-EDIT", group).replace("EDIT_REGION", "us-east-1")
        yield yaml.safe_load(text)


@pytest.mark.slow
def test_rays_launcher_and_autoscaler_ask_for_what_the_policy_allows_and_for_all_of_it(
    account: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config

    asked: list[tuple[str, dict[str, Any]]] = []
    create = botocore.session.Session.create_client

    def recording(self: Any, *words: Any, **options: Any) -> Any:
        client = create(self, *words, **options)

        def note(model: Any, params: dict[str, Any], **_: Any) -> None:
            asked.append((f"{model.service_model.service_name}:{model.name}", params["body"]))

        client.meta.events.register("before-call", note)
        return client

    monkeypatch.setattr(botocore.session.Session, "create_client", recording)
    config = AWSNodeProvider.fillout_available_node_types_resources(
        AWSNodeProvider.bootstrap_config(prepare_config(account))
    )
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, node in config["available_node_types"].items():
        tags = {"ray-node-type": name, "ray-node-name": name, "ray-launch-config": "x"}
        provider.create_node(dict(node["node_config"]), tags, 1)
    nodes = provider.non_terminated_nodes({})
    assert len(nodes) == len(config["available_node_types"]) == 7
    provider.set_node_tags(nodes[0], {"ray-node-status": "up-to-date"})
    deadline = time.monotonic() + 20
    while not any(action == "ec2:CreateTags" for action, _ in asked):  # sent by a thread
        assert time.monotonic() < deadline
        time.sleep(0.05)
    provider.terminate_nodes(nodes)
    assert {action for action, _ in asked} | {"iam:PassRole"} == actions(policy("launch"))
    for action, body in asked:
        if action == "ec2:RunInstances":  # the tag by which the policy knows this cluster's nodes; key pair and role
            tags = {body[key]: body[key.replace("Key", "Value")] for key in body if re.search(r"Tag\.\d+\.Key$", key)}
            assert tags["ray-cluster-name"] == "lemon"
            assert body["KeyName"] == "lemon"
            assert body["IamInstanceProfile.Name"] in ("lemon-head", "lemon-worker")


@pytest.fixture
def aws_server(tmp_path: Path) -> Iterator[str]:
    """The address of moto's server."""
    pytest.importorskip("moto", reason="moto stands in for AWS; make setup installs it")
    (port,) = free_ports(1)
    with (tmp_path / "moto.log").open("wb") as log:
        code = f"from moto.server import main; main(['-p', '{port}'])"
        server = subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log)
        try:
            wait_for(lambda: b"Running on" in (tmp_path / "moto.log").read_bytes())
            yield f"http://127.0.0.1:{port}"
        finally:
            server.kill()
            server.wait()


def wait_for(condition: Callable[[], bool], *, limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("aws") is None, reason="the command line of AWS is not installed")
def test_the_set_up_runs_twice_on_a_stand_in_and_fills_in_the_cluster_file(aws_server: str, tmp_path: Path) -> None:
    home, programs = tmp_path / "home", tmp_path / "bin"
    home.mkdir()
    programs.mkdir()
    # An option, because the command line (1.45) does not heed AWS_ENDPOINT_URL for RDS.
    (programs / "aws").write_text(f'#!/bin/sh\nexec {shutil.which("aws")} --endpoint-url {aws_server} "$@"\n')
    (programs / "aws").chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "PYTHON"))}
    environment |= {"HOME": str(home), "PATH": f"{programs}:{environment['PATH']}", "AMI": "ami-0123456789abcdef0"}
    environment |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "BUCKET": "b", "SSH_FROM": "192.0.2.1/32"}
    filled, secrets = [], []
    for _ in range(2):
        command = ["bash", FOLDER / "aws_setup.sh"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        filled.append((home / ".lemon-cluster.yaml").read_text())
        secrets.append({path.name: path.read_text() for path in (home / ".lemon-cluster").iterdir()})
    assert filled[0] == filled[1]
    assert secrets[0] == secrets[1]
    assert "EDIT" not in "\n".join(line.partition("#")[0] for line in filled[0].splitlines())
    database = re.search(r"postgresql\+psycopg2://mlflow@(\S+):5432/mlflow", filled[0])
    assert database
    assert secrets[0]["pgpass"] == f"{database[1]}:5432:mlflow:mlflow:{secrets[0]['password']}\n"
    for path in (home / ".ssh" / "lemon", *(home / ".lemon-cluster").iterdir()):
        assert path.stat().st_mode & 0o077 == 0, path
    asked = subprocess.run(
        ["aws", "iam", "get-role-policy", "--role-name", "lemon-head", "--policy-name", "launch"],
        env={**environment, "AWS_DEFAULT_REGION": "us-east-1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    written = json.loads(asked.stdout)["PolicyDocument"]
    assert actions(written) == actions(policy("launch"))
    assert "EDIT" not in json.dumps(written)
