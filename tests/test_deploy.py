"""What ships for fleets: the image, the compose file, the chart, the dashboard. Checked in plain Python, and by their own tools where
there are any."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import yaml

from tests.serve.test_metrics import STATS
from trimtab.cli.serve import serve
from trimtab.serve.admission import Admission
from trimtab.serve.metrics import Metrics

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "trimtab"
PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
NAME = re.compile(r"\b(?:trimtab_|vllm:)[a-z0-9_]+")
OPTIONS = {name for option in serve.params for name in option.opts}


def samples(vllm: bool = False) -> set[str]:
    """Names of the series that a server with tenants has at /metrics."""
    sharing: Any = SimpleNamespace(servers=2, problem="")
    fine: Any = SimpleNamespace(problem="", lost=0)
    made = Metrics(
        "base", lambda: STATS, admission=Admission(leases=sharing), audit=fine, usage=fine, vllm=vllm, max_running=4, block_size=16
    )
    lines = made.text().decode().splitlines()
    return {re.split(r"[{ ]", line)[0] for line in lines if not line.startswith("#")}


def compose() -> dict[str, Any]:
    told: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return told


def template(name: str) -> str:
    return (CHART / "templates" / name).read_text()


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    board = json.loads((DEPLOY / "grafana" / "trimtab.json").read_text())
    asked = {name for panel in board["panels"] for target in panel["targets"] for name in NAME.findall(target["expr"])}
    assert len(asked) > 20 and asked <= samples(), asked - samples()
    assert len({p["id"] for p in board["panels"]}) == len(board["panels"])
    (source,) = yaml.safe_load((DEPLOY / "grafana" / "datasources.yaml").read_text())["datasources"]
    assert {p["datasource"]["uid"] for p in board["panels"]} == {source["uid"]}


def test_gateways_find_what_the_inference_extension_reads() -> None:
    wanted = {"vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc"}
    assert wanted | {"vllm:lora_requests_info", "vllm:cache_config_info"} <= samples(vllm=True)
    asked = {"trimtab_num_requests_waiting"} | {"vllm:num_requests_waiting"}
    assert asked <= samples() | samples(vllm=True) and "num_requests_waiting" in template("autoscaling.yaml")


def test_every_argument_is_an_option_of_serve() -> None:
    command, *arguments = compose()["services"]["server"]["command"]
    assert command == "serve" and {a.partition("=")[0] for a in arguments} <= OPTIONS
    given = set(re.findall(r"^ +- (--[a-z-]+)=", template("deployment.yaml"), re.MULTILINE))
    assert {"--tenants", "--metrics-port", "--drain-seconds"} <= given <= OPTIONS


def test_ports_and_files_of_the_compose_file_agree() -> None:
    services = compose()["services"]
    assert set(services) == {"server", "database", "prometheus", "grafana"}
    exposed = re.search(r"^EXPOSE (.*)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert exposed is not None and exposed[1].split() == ["8000", "9400"]
    scraped = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"][0]["dns_sd_configs"][0]
    assert scraped["names"] == ["server"] and f"--metrics-port={scraped['port']}" in services["server"]["command"]
    for service in services.values():
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            assert (DEPLOY / source).is_file() if source.startswith(".") else source in compose()["volumes"]
    assert (DEPLOY / services["server"]["build"]["context"] / services["server"]["build"]["dockerfile"]).resolve().is_file()


def test_the_image_is_not_roots_and_what_it_copies_is_there() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    kept = (DEPLOY / "Dockerfile.dockerignore").read_text()
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["10001"] and "VOLUME /data" in text
    for copied in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE):
        for name in copied.split():
            assert (ROOT / name).exists() and f"!{name}" in kept
    for stage in ("cpu", "cuda"):
        assert f"AS wheels-{stage}" in text


def test_values_fit_their_schema_and_are_documented_and_used() -> None:
    schema, values = json.loads((CHART / "values.schema.json").read_text()), yaml.safe_load((CHART / "values.yaml").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.validate(values, schema)
    templates = "".join(p.read_text() for p in (CHART / "templates").iterdir())
    leaves = {f"{k}.{x}" for k, v in values.items() if isinstance(v, dict) and v for x in v} | {
        k for k, v in values.items() if not (isinstance(v, dict) and v)
    }
    for leaf in leaves:
        assert f"`{leaf}`" in PAGE, f"docs/deploy.md does not say what {leaf} does"
        assert f".Values.{leaf}" in templates or f".Values.{leaf.partition('.')[0]} " in templates, leaf
    assert set(re.findall(r"\.Values\.([a-zA-Z.]+)", templates)) <= leaves | {"resources"}
    for wrong in ({"replica": 3}, {"metrics": "x"}, {"database": {"url": "postgresql://user:secret@host/db"}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(values | wrong, schema)


def test_a_pod_has_time_to_end() -> None:
    text = template("deployment.yaml")
    assert "terminationGracePeriodSeconds: {{ add .Values.preStopSeconds .Values.drainSeconds 15 }}" in text
    assert text.count("path: /readyz") == 2 and text.count("path: /livez") == 1
    drain = next(int(a.partition("=")[2]) for a in compose()["services"]["server"]["command"] if a.startswith("--drain-seconds"))
    assert int(compose()["services"]["server"]["stop_grace_period"].removesuffix("s")) > drain


def test_templates_open_what_they_close() -> None:
    for path in (CHART / "templates").iterdir():
        words = re.findall(r"{{-?\s*(if|with|range|define|end)\b", path.read_text())
        assert words.count("end") == len(words) - words.count("end"), path.name


def tool(*names: str) -> str:
    """The first of these programs that there is; else the test is skipped."""
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    found = next((p for n in names if (p := shutil.which(n, path=places))), None)
    if found is None:
        pytest.skip(f"{names[0]} is not installed")
    return found


def ran(*command: str, **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={"PATH": "/usr/bin:/bin", **environment}, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_hadolint_finds_nothing() -> None:
    ran(tool("hadolint"), str(DEPLOY / "Dockerfile"))


def test_compose_takes_its_file() -> None:
    docker = shutil.which("docker")
    if docker and subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode == 0:
        ran(docker, "compose", "-f", str(DEPLOY / "compose.yaml"), "config", "--quiet", POSTGRES_PASSWORD="x")
        return
    docker_compose = tool("docker-compose")  # Debian's, of version 1: all else is as today, but a project had no name
    command = [docker_compose, "--project-directory", str(DEPLOY), "-f", "-", "config"]
    text = yaml.safe_dump({k: v for k, v in compose().items() if k != "name"})
    done = subprocess.run(
        command,
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", "POSTGRES_PASSWORD": "x"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["services"].keys() == compose()["services"].keys()
    without = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, env={"PATH": "/usr/bin:/bin"}, check=False)
    assert without.returncode and "POSTGRES_PASSWORD" in without.stderr


URL = {"url": "postgresql://trimtab@db/trimtab"}
SETTINGS: dict[str, dict[str, Any]] = {
    "least": {"database": URL},
    "much": {
        "database": URL | {"passwordSecret": "p"},
        "autoscaling": {"enabled": True},
        "serviceMonitor": {"enabled": True},
        "store": {"claim": "s"},
        "cache": {"claim": "c"},
        "nodeSelector": {"pool": "gpu"},
        "resources": {"limits": {"nvidia.com/gpu": 1}},
        "arguments": ["--kv-gb=2"],
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_helms_library_takes_the_chart(name: str) -> None:
    """Helm 4 as a library: what `helm lint --strict` and `helm template` say."""
    helm = pytest.importorskip("helm_python", reason="helm is not installed: pip install helm-python-sdk")
    values = SETTINGS[name]
    assert helm.lint(str(CHART), values, strict=True)["errors"] == []
    rendered = helm.Chart.load(str(CHART)).render(values, name="x")
    found = {d["kind"]: d for text in rendered.values() for d in yaml.safe_load_all(text) if d}
    more = {"ScaledObject", "ServiceMonitor"} if name == "much" else set()
    assert found.keys() == {"Deployment", "PodDisruptionBudget", "Service"} | more
    spec = found["Deployment"]["spec"]
    assert ("replicas" in spec) == (name == "least"), "an autoscaler sets the number itself"
    (pod,) = spec["template"]["spec"]["containers"]
    assert found["Service"]["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    ports = {p["name"] for p in pod["ports"]}
    assert all(p["targetPort"] in ports for p in found["Service"]["spec"]["ports"])
    if name == "much":
        assert "--kv-gb=2" in pod["args"] and pod["resources"]["limits"]["nvidia.com/gpu"] == 1
        assert {v["persistentVolumeClaim"]["claimName"] for v in spec["template"]["spec"]["volumes"] if "persistentVolumeClaim" in v} == {
            "s",
            "c",
        }


def test_helms_library_refuses_wrong_values() -> None:
    helm = pytest.importorskip("helm_python", reason="helm is not installed: pip install helm-python-sdk")
    for wrong in ({"replicas": "x"}, {"replica": 3}, {"database": {"url": "postgresql://user:secret@host/db"}}):
        assert helm.lint(str(CHART), {"database": URL} | wrong)["errors"], wrong


def test_helm_renders_the_chart() -> None:
    helm, url = tool("helm"), "database.url=postgresql://trimtab@db/trimtab"
    ran(helm, "lint", str(CHART), "--set", url)
    on = ["--set", url, "--set", "autoscaling.enabled=true,serviceMonitor.enabled=true,store.claim=s,database.passwordSecret=p"]
    kinds = [d["kind"] for d in yaml.safe_load_all(ran(helm, "template", "x", str(CHART), *on)) if d]
    assert sorted(kinds) == ["Deployment", "PodDisruptionBudget", "ScaledObject", "Service", "ServiceMonitor"]
