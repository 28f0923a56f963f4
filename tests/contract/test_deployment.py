"""The files of docs/deployment: they parse, their commands are ones that the server takes, and what
waits for the server waits longer than it may take."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmserve.limits import Limits
from llmserve.server.auth import PUBLIC_PATHS
from llmserve.server.cli_serve import add_arguments

yaml = pytest.importorskip("yaml")

FOLDER = Path(__file__).parents[2] / "docs" / "deployment"
LIMITS = Limits()


def text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all(text(name)))


def compose() -> Any:
    return documents("compose.yaml")[0]


def unit() -> dict[str, list[str]]:
    """Settings of the unit; one that is given several times has several values."""
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", text("llmserve.service"), re.MULTILINE):
        found.setdefault(name, []).append(value)
    return found


def pod() -> Any:
    return documents("kubernetes.yaml")[0]["spec"]["template"]["spec"]


def dockerfile(instruction: str) -> list[str]:
    """The words of the last one of its name, given as a list."""
    return json.loads(re.findall(rf"^ *{instruction} (\[.*\])$", text("Dockerfile"), re.M)[-1])


COMMANDS = {
    "Dockerfile": lambda: dockerfile("CMD"),
    "compose.yaml": lambda: compose()["services"]["llmserve"]["command"],
    "llmserve.service": lambda: shlex.split(unit()["ExecStart"][0])[1:],
    "kubernetes.yaml": lambda: pod()["containers"][0]["args"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command_is_one_that_the_server_takes(name: str) -> None:
    verb, *rest = COMMANDS[name]()
    assert verb == "serve"
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = parser.parse_args(rest)
    assert arguments.port == 8000
    assert arguments.host == ("127.0.0.1" if name == "llmserve.service" else "0.0.0.0")  # noqa: S104


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_yaml_parses(path: Path) -> None:
    assert all(isinstance(document, dict) for document in documents(path.name))


def test_everything_waits_longer_than_a_drain_takes() -> None:
    stop = {
        "compose": compose()["services"]["llmserve"]["stop_grace_period"].removesuffix("s"),
        "systemd": unit()["TimeoutStopSec"][0],
        "kubernetes": pod()["terminationGracePeriodSeconds"],
    }
    before = float(pod()["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert all(float(seconds) > LIMITS.drain_s + 5 for seconds in stop.values())
    assert float(stop["kubernetes"]) > LIMITS.drain_s + before + 5


def test_probes_ask_routes_that_need_no_key() -> None:
    container = pod()["containers"][0]
    asked = {container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("liveness", "readiness")}
    asked |= set(re.findall(r"127\.0\.0\.1:8000(/\w+)", text("Dockerfile")))
    assert asked == {"/health", "/ready"}
    assert asked <= PUBLIC_PATHS


def test_nothing_runs_as_root_or_writes() -> None:
    assert re.search(r"^USER 10001:10001$", text("Dockerfile"), re.MULTILINE)
    service = compose()["services"]["llmserve"]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert pod()["securityContext"]["runAsNonRoot"]
    assert pod()["containers"][0]["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert unit()["DynamicUser"] == ["yes"]


def test_what_a_file_mounts_is_there_or_is_said_how_to_make() -> None:
    services = compose()["services"].values()
    sources = [mount.partition(":")[0] for one in services for mount in one["volumes"]]
    for source in sources:
        if source.startswith("."):
            assert (FOLDER / source).is_file(), source
    for secret in compose()["secrets"].values():
        assert secret["file"].removeprefix("./") in text("README.md")
    mounts = {mount["name"] for mount in pod()["containers"][0]["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod()["volumes"]}


def test_labels_and_ports_of_the_cluster_fit_together() -> None:
    deployment, service, policy = documents("kubernetes.yaml")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert service["spec"]["selector"] == labels
    assert policy["spec"]["podSelector"]["matchLabels"] == labels
    assert pod()["containers"][0]["ports"] == [{"name": "http", "containerPort": 8000}]
    assert service["spec"]["ports"][0]["targetPort"] == "http"


def test_the_image_is_built_from_files_that_exist() -> None:
    root = FOLDER.parents[1]
    listed = re.findall(r"^!(.+)$", text("Dockerfile.dockerignore"), re.MULTILINE)
    assert all((root / name).exists() for name in listed)
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"} <= set(listed)
    assert {"llmserve", "server", "training", "export", "benchmarks"} <= set(listed)


def test_the_proxy_keeps_to_the_servers_bounds() -> None:
    settings = dict(re.findall(r"^\s*(\w+) (\d+)[sm];", text("nginx.conf"), re.MULTILINE))
    assert float(settings["keepalive_timeout"]) < LIMITS.keep_alive_s
    assert float(settings["proxy_read_timeout"]) > LIMITS.max_deadline_s
    assert float(settings["client_max_body_size"]) * 2**20 >= LIMITS.max_body_bytes
    assert "proxy_buffering off;" in text("nginx.conf")


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    path = tmp_path / "llmserve.service"
    path.write_text(
        text("llmserve.service").replace("/opt/llmserve/bin/llmserve", sys.executable),
        encoding="utf-8",
    )
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "llmserve.service" not in done.stderr


@pytest.mark.skipif(
    not (shutil.which("nginx") and shutil.which("openssl")), reason="no nginx or openssl"
)
def test_nginx_takes_its_file(tmp_path: Path) -> None:
    key, certificate = tmp_path / "privkey.pem", tmp_path / "fullchain.pem"
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
            "-nodes", "-subj", "/CN=llm.example.org", "-keyout", str(key), "-out", str(certificate),
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    inner = text("nginx.conf").replace("/etc/letsencrypt/live/llm.example.org", str(tmp_path))
    whole = tmp_path / "nginx.conf"
    log = f"error_log {tmp_path}/error.log; pid {tmp_path}/pid; events {{}}"
    whole.write_text(f"{log} http {{ {inner} }}\n", encoding="utf-8")
    command = ["nginx", "-t", "-e", f"{tmp_path}/error.log", "-c", str(whole)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
