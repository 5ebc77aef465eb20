"""The Dockerfile and what is in deploy/: all of it is run, or read by the tool it is for."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import dockerfile
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ports import free_port
from server_process import get_status, running

from llmproxy import __version__, config
from llmproxy.metrics import Metrics

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
STAGES = dockerfile.parse((ROOT / "Dockerfile").read_text())
FINAL = STAGES[-1]
COMPOSE_FILES = sorted(DEPLOY.glob("compose*.yaml"))
CONFIGS = sorted(DEPLOY.glob("*/config.toml"))
UNIT = DEPLOY / "systemd" / "llmproxy.service"


# The image


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> dockerfile.Builder:
    builder = dockerfile.Builder(ROOT, tmp_path_factory.mktemp("image"))
    builder.build(STAGES)
    return builder


def _admin_config(folder: Path, admin_port: int, text: str = "") -> Path:
    path = folder / "config.toml"
    path.write_text(f"""{text or f"port = {free_port()}"}
[db]
uri = "sqlite://{folder}/db.sqlite"
[admin]
listen = ["tcp:{admin_port}:interface=127.0.0.1"]
""")
    return path


@pytest.mark.timeout(300)
def test_the_image_serves_and_its_health_check_sees_it(image: dockerfile.Builder, tmp_path: Path):
    admin_port = free_port()
    env = {**image.env, "LLMPROXY_CONFIG": str(_admin_config(tmp_path, admin_port))}
    check = json.loads(FINAL.only("HEALTHCHECK").partition(" CMD ")[2])
    check = [word.replace(":8081/", f":{admin_port}/") for word in check]
    python = image.root / "opt/llmproxy/bin/python"
    command = [python, *json.loads(FINAL.only("ENTRYPOINT"))[1:]]

    with running(command, admin_port=admin_port, cwd=tmp_path, env=env):
        healthy = subprocess.run(check, env=env, capture_output=True)
    stopped = subprocess.run(check, env=env, capture_output=True)

    assert healthy.returncode == 0, healthy.stderr
    assert stopped.returncode == 1


@pytest.mark.timeout(300)
def test_the_image_has_no_sources_and_no_installer(image: dockerfile.Builder):
    packages = {path.name for path in image.root.glob("opt/llmproxy/lib/python3*/site-packages/*")}
    assert "llmproxy" in packages
    assert not packages & {"pip", "setuptools", "wheel"}
    assert {path.name for path in image.root.iterdir()} == {"opt", "var", "etc"}


@pytest.mark.timeout(300)
def test_the_image_knows_its_plugin_without_writing(image: dockerfile.Builder):
    [cache] = image.root.rglob("twisted/plugins/dropin.cache")
    assert b"llmproxy_plugin" in cache.read_bytes()


def test_the_image_runs_as_a_user_without_rights():
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", FINAL.only("USER"))


def test_the_signals_reach_the_process_of_the_image():
    # The exec form: a shell in between would take the signals, and not pass them on.
    assert json.loads(FINAL.only("ENTRYPOINT"))[0] == "python"
    assert FINAL.only("STOPSIGNAL") == "SIGTERM"


def test_the_context_of_the_image_has_what_is_copied():
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    copied = {
        source
        for stage in STAGES
        for word, rest in stage.steps
        if word == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert copied == allowed


# What the image installs

LOCK = (DEPLOY / "requirements.lock").read_text()
LOCKED = dict(re.findall(r"(?m)^([a-z0-9-]+)==(\S+)", LOCK))


def test_the_lock_names_no_host():
    # Nothing but packages and their hashes: no option, no address.
    line = r"#|[a-z0-9-]+==[\w.]+ \\$|    --hash=sha256:"
    assert all(re.match(line, each) for each in LOCK.splitlines())


def test_the_lock_has_hashes_of_each_package():
    packages = re.split(r"(?m)^(?=[a-z0-9])", LOCK)[1:]
    assert len(packages) == len(LOCKED) > 20
    for package in packages:
        _, *hashes = package.rstrip().split(" \\\n")
        assert hashes
        assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}", each) for each in hashes)


def test_the_lock_has_what_the_project_requires():
    # After a change there: make lock
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, project["dependencies"]):
        version = LOCKED[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement


def test_the_lock_is_made_for_the_python_of_the_image():
    made = subprocess.run(
        ["make", "--dry-run", "lock"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    [script] = re.findall(r'--python-version "\$\((.*)\)"', made.stdout)
    version = subprocess.run(
        ["/bin/sh", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert {stage.base for stage in STAGES} == {f"python:{version.stdout.strip()}-slim"}


# systemd


def _verify(folder: Path) -> str:
    """What systemd-analyze has against the units, with a program that exists here."""
    unit = UNIT.read_text().replace("/opt/llmproxy/bin/python", sys.executable)
    (folder / UNIT.name).write_text(unit)
    shutil.copy(UNIT.with_suffix(".socket"), folder)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", folder / UNIT.name, folder / "llmproxy.socket"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    complaints = [line for line in done.stderr.splitlines() if "llmproxy" in line]
    return "\n".join(complaints) or (done.stderr if done.returncode else "")


needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


@needs_systemd
def test_systemd_accepts_the_units(tmp_path: Path):
    assert _verify(tmp_path) == ""


@needs_systemd
def test_systemd_finds_the_service_well_confined():
    # 0 is best, 10 is no confinement; it has 1.1.
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--threshold=13", UNIT],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _settings(unit: Path) -> dict[str, str]:
    lines = [line for line in unit.read_text().splitlines() if re.match(r"\w+=", line)]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_systemd_waits_longer_than_the_drain():
    assert float(_settings(UNIT)["TimeoutStopSec"]) > config.Config().drain_deadline


def test_systemd_allows_what_tls_needs():
    # Refused, every TLS connection fails: pyOpenSSL's callbacks are made in memory of this kind.
    assert _settings(UNIT).get("MemoryDenyWriteExecute", "no") == "no"


@pytest.mark.parametrize("workers", [1, 2])
def test_the_proxy_serves_on_the_socket_that_systemd_opened(tmp_path: Path, workers: int):
    """As sd_listen_fds(3) has it: the socket is descriptor 3, the variables name the process."""
    admin_port = free_port()
    listen = re.search(r"^listen = .*$", (UNIT.parent / "config.toml").read_text(), re.M)
    assert listen
    path = _admin_config(tmp_path, admin_port, f"{listen[0]}\nworkers = {workers}")
    script = f"""
        export LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=llmproxy.socket
        exec {shlex.quote(sys.executable)} -m llmproxy -c {shlex.quote(str(path))} 3<&"$LISTENER"
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/models"
        env["LISTENER"] = str(listener.fileno())
        with running(
            ["bash", "-c", script],
            admin_port=admin_port,
            cwd=tmp_path,
            env=env,
            pass_fds=[listener.fileno()],
        ):
            assert get_status(url) == 401


# Compose


@pytest.fixture(params=COMPOSE_FILES, ids=lambda path: path.name)
def compose(request: pytest.FixtureRequest) -> dict[str, Any]:
    return yaml.safe_load(request.param.read_text())


def test_compose_files_mount_what_is_there(compose: dict[str, Any]):
    for service in compose["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            known = source in compose["volumes"]
            assert known or (source.startswith("./") and (DEPLOY / source).exists()), volume


def test_compose_files_build_the_image_from_the_repository(compose: dict[str, Any]):
    context = compose["services"]["llmproxy"]["build"]["context"]
    assert (DEPLOY / context / "Dockerfile").samefile(ROOT / "Dockerfile")


def test_compose_files_take_secrets_from_the_environment(compose: dict[str, Any]):
    used = {
        secret for service in compose["services"].values() for secret in service.get("secrets", ())
    }
    assert used == compose["secrets"].keys()
    assert all(secret.keys() == {"environment"} for secret in compose["secrets"].values())


def test_compose_files_have_the_secrets_that_the_configuration_reads(compose: dict[str, Any]):
    service = compose["services"]["llmproxy"]
    [folder] = [text.split(":")[0] for text in service["volumes"] if ":/etc/llmproxy" in text]
    read = re.findall(r'"/run/secrets/(\w+)"', (DEPLOY / folder / "config.toml").read_text())
    assert sorted(read) == sorted(service["secrets"])


def test_no_container_gets_rights_that_it_does_not_start_with(compose: dict[str, Any]):
    for service in compose["services"].values():
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_compose_files_run_the_proxy_without_rights_on_files_that_can_t_be_changed(
    compose: dict[str, Any],
):
    service = compose["services"]["llmproxy"]
    assert service["cap_drop"] == ["ALL"]
    assert service["read_only"] is True
    assert service["ulimits"]["core"] == 0


def test_compose_waits_longer_than_the_drain(compose: dict[str, Any]):
    grace = compose["services"]["llmproxy"]["stop_grace_period"]
    assert float(grace.removesuffix("s")) > config.Config().drain_deadline


def test_compose_publishes_the_clients_port_alone(compose: dict[str, Any]):
    assert compose["services"]["llmproxy"]["ports"] == [f"8080:{FINAL.only('EXPOSE')}"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_configurations_are_valid(path: Path, tmp_path: Path):
    # The secrets come into the container later.
    text = path.read_text().replace("/run/secrets/", f"{tmp_path}/")
    (tmp_path / "backend_token").write_text("secret")
    (tmp_path / "mongodb_uri").write_text("mongodb://user:password@host/")
    (tmp_path / "config.toml").write_text(text)
    loaded = config.load(tmp_path / "config.toml", {})
    stored = loaded.ledger.path if loaded.db.is_mongodb else loaded.db.sqlite_path
    assert str(stored).startswith("/var/lib/llmproxy/")


def test_the_mongodb_script_grants_what_is_needed_and_no_more():
    script = (DEPLOY / "mongodb-init.js").read_text()
    actions = re.findall(r'collection: "(\w+)" }, actions: \[(.*?)\]', script)
    assert actions == [
        ("api_keys", '"find"'),
        ("events_oneoff", '"insert"'),
        ("limits", '"find", "insert", "update"'),
    ]
    granted = re.findall(r'{ role: "(\w+)", db: "(\w+)" }', script)
    assert granted == [
        ("apiKeysReader", "cgc"),
        ("completionBillingWriter", "billing"),
        ("limitsWriter", "llmproxy"),
    ]


# Prometheus and Grafana


@pytest.fixture(scope="module")
def metric_names() -> set[str]:
    """Every sample name that the proxy can expose, and `up`, which Prometheus adds."""
    names = {"up"}
    for line in Metrics(__version__, ["model"]).exposition().decode().splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            suffixes = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
            names |= {name + suffix for suffix in suffixes}
    return names


def _names_in(expression: str) -> set[str]:
    """The metrics of a PromQL expression: words that are neither functions, labels nor keywords."""
    expression = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\bby \([^)]*\)", "", expression)
    return set(re.findall(r"\b[a-z_]\w*\b(?!\s*\()", expression)) - {"by", "and", "or", "unless"}


RULES = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((DEPLOY / "grafana" / "llmproxy.json").read_text())
EXPRESSIONS = [rule["expr"] for rule in RULES] + [
    target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_use_metrics_that_exist(expression: str, metric_names: set[str]):
    found = _names_in(expression)
    assert found
    assert found <= metric_names


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_have_their_brackets_closed(expression: str):
    for opening, closing in ("()", "[]", "{}"):
        assert expression.count(opening) == expression.count(closing)


def test_alerts_say_what_is_wrong_and_how_bad_it_is():
    alerts = [rule for rule in RULES if "alert" in rule]
    assert alerts
    assert all(alert["annotations"]["summary"] for alert in alerts)
    assert {alert["labels"]["severity"] for alert in alerts} == {"critical", "warning"}


def test_prometheus_reads_the_rules_that_are_there():
    settings = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    assert all((DEPLOY / "prometheus" / name).exists() for name in settings["rule_files"])


def test_every_panel_has_its_own_place():
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
