"""The container files name only what exists, require every secret, and check the health of what runs."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.broker import DOORBELLS
from service.settings import Settings

ROOT = Path(__file__).parent.parent.parent
COMPOSE_TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE = yaml.safe_load(COMPOSE_TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
AGENT_ONLY = {"SECATEURS_TOKEN"}
OWN = {name for name, service in SERVICES.items() if str(service["image"]).startswith("secateurs")}


def modules(command: list[str]) -> list[str]:
    """The modules that a command imports."""
    match command:
        case ["python", "-m", module, *_]:
            return [module]
        case ["uvicorn", target, *_]:
            return ["uvicorn", target.partition(":")[0]]
        case ["celery", "-A", module, *_]:
            return ["celery", module]
    raise AssertionError(f"unknown command {command}")


def test_every_part_is_there() -> None:
    assert set(SERVICES) == {"postgres", "redis", "migrate", "api", "reconciler", "worker", "agent"}
    assert {"migrate", "api", "reconciler", "worker", "agent"} == OWN


@pytest.mark.parametrize("name", sorted(OWN))
def test_commands_exist(name: str) -> None:
    for module in modules(SERVICES[name]["command"]):
        assert importlib.util.find_spec(module), module


def test_the_api_is_made_by_a_factory() -> None:
    command = SERVICES["api"]["command"]
    module, _, attribute = command[1].partition(":")
    assert "--factory" in command
    assert f"def {attribute}(" in Path(str(importlib.util.find_spec(module).origin)).read_text()  # type: ignore[union-attr]


def test_the_worker_listens_where_the_doorbells_ring() -> None:
    command = SERVICES["worker"]["command"]
    assert command[command.index("-Q") + 1].split(",") == list(DOORBELLS)


def test_settings_that_are_named_exist() -> None:
    known = {f"SECATEURS_{name.upper()}" for name in Settings.model_fields} | AGENT_ONLY
    named = set(re.findall(r"SECATEURS_[A-Z_]+", COMPOSE_TEXT + DOCKERFILE))
    assert named <= known
    assert "SECATEURS_DATABASE_URL" in named
    agent = (ROOT / "latency_profiler" / "agent.py").read_text()
    assert all(name in agent for name in AGENT_ONLY)


def test_no_secret_has_a_default() -> None:
    uses = re.findall(r"\$\{(\w*PASSWORD\w*)([^}]*)\}", COMPOSE_TEXT)
    assert {name for name, _ in uses} == {"POSTGRES_PASSWORD", "REDIS_PASSWORD"}
    assert all(rest.startswith(":?") for _, rest in uses)


def test_everything_restarts_but_the_migration() -> None:
    assert SERVICES["migrate"]["restart"] == "no"
    assert {service["restart"] for name, service in SERVICES.items() if name != "migrate"} == {"unless-stopped"}


def test_everything_that_runs_is_checked() -> None:
    assert {name for name, service in SERVICES.items() if "healthcheck" not in service} == {"migrate"}


def test_nothing_starts_before_the_database_is_migrated() -> None:
    assert SERVICES["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    for name in ("api", "reconciler", "worker"):
        waits = {other: rule["condition"] for other, rule in SERVICES[name]["depends_on"].items()}
        assert waits == {
            "postgres": "service_healthy", "redis": "service_healthy", "migrate": "service_completed_successfully",
        }  # fmt: skip


def test_whoever_writes_results_shares_one_volume_with_the_api() -> None:
    mounts = {tuple(SERVICES[name]["volumes"]) for name in ("api", "worker", "reconciler")}
    assert len(mounts) == 1
    named = {mount.partition(":")[0] for service in SERVICES.values() for mount in service.get("volumes", [])}
    assert {name for name in named if not name.startswith("$")} <= set(COMPOSE["volumes"])


def test_redis_keeps_its_messages() -> None:
    command = SERVICES["redis"]["command"]
    assert command[command.index("--appendonly") + 1] == "yes"
    assert command[command.index("--maxmemory-policy") + 1] == "noeviction"


def test_only_the_api_is_published_and_only_to_this_machine() -> None:
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert list(ports) == ["api"]
    assert all(port.startswith("127.0.0.1:") for port in ports["api"])


def test_the_image_runs_without_root() -> None:
    final = DOCKERFILE.split("\nFROM ")[-1]
    assert re.findall(r"^USER (\w+)$", final, re.MULTILINE) == ["secateurs"]
    assert final.index("USER secateurs") < final.index("CMD ")


def test_the_image_holds_every_package() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    for package in ("latency_profiler", "service", "workers", "migrations", "pyproject.toml"):
        assert re.search(rf"^COPY .*\b{package}\b", DOCKERFILE, re.MULTILINE)
        assert f"!{package}" in ignored


def test_server_suites_may_not_be_skipped(tmp_path: Path) -> None:
    """The guard of `.ci/run`, on a report in which a skipped test is the only one on PostgreSQL."""

    def guard(skipped: str) -> int:
        case = '<testcase classname="tests.service.test_jobs" name="test_{}[{}]">{}</testcase>'
        cases = [case.format(i, server, skipped) for i in range(30) for server in ("postgresql", "redis")]
        report = tmp_path / "junit.xml"
        report.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
        command = [sys.executable, str(ROOT / ".ci" / "required.py"), str(report)]
        return subprocess.run(command, capture_output=True, check=False).returncode

    assert guard("") == 0
    assert guard("<skipped/>") == 1
