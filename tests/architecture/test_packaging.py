"""Packaging files are valid and match the documentation."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from doubles.kubernetes import schemas
from sandbox.bootstrap.cluster_placement import KUBERNETES_WORKER_COMMAND
from sandbox.bootstrap.package_installation import PACKAGES
from sandbox.bootstrap.settings.schema import KubernetesSection
from sandbox.cluster_engines.kubernetes.engine import PERMISSIONS, Permission
from sandbox.dashboard.pages.documentation import GUIDE_PAGES

DATA_SUFFIXES = {".css", ".html", ".js", ".json", ".svg", ".toml"}


@pytest.fixture
def unit(root: Path) -> str:
    return (root / "packaging" / "systemd" / "sandbox.service").read_text()


def test_systemd_unit_does_not_stop_runners_on_restart(unit: str):
    settings = dict(line.split("=", 1) for line in unit.splitlines() if re.match(r"[A-Z][A-Za-z]+=", line))
    expected = {"KillMode": "process", "Delegate": "yes", "OOMPolicy": "continue", "DelegateSubgroup": "server"}
    assert expected.items() <= settings.items()
    forbidden = {"PrivateTmp", "ProtectSystem", "PrivateDevices", "ProtectHome", "NoNewPrivileges", "SystemCallFilter"}
    assert forbidden & set(settings) == set()


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_accepts_the_unit_file(unit: str, tmp_path: Path):
    sandbox = Path(sys.executable).with_name("sandbox")
    copy = tmp_path / "sandbox.service"
    copy.write_text(unit.replace("/opt/sandbox/.venv/bin/sandbox", str(sandbox)))
    command = ["systemd-analyze", "verify", "--man=no", str(copy)]
    verified = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")
    copy.write_text(unit.replace("KillMode=process", "KillMod=process"))
    invalid = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "KillMod" in invalid.stderr, "systemd-analyze did not detect the error"


def test_container_installs_the_packages_of_the_setup_script(root: Path):
    text = (root / "packaging" / "Containerfile").read_text()
    installed = set(re.findall(r"[a-z0-9-]+", text.split("--no-install-recommends")[1].split("&&")[0]))
    setup = (root / "script" / "setup").read_text().split("missing_packages() {")[1].split("if [ ")[0]
    assert set(re.findall(r"\|\| echo ([a-z0-9-]+)", setup)) <= installed


@pytest.fixture
def kubernetes_objects(root: Path) -> list[dict]:
    return list(yaml.safe_load_all((root / "packaging" / "kubernetes" / "sandbox.yaml").read_text()))


def test_kubernetes_objects_are_valid(kubernetes_objects: list[dict]):
    for each in kubernetes_objects:
        schemas.validate(each)
    names = {(each["kind"], each["metadata"]["name"]) for each in kubernetes_objects}
    section = KubernetesSection()
    assert {("Namespace", section.namespace), ("ServiceAccount", section.service_account)} <= names
    namespaces = {each["metadata"].get("namespace", section.namespace) for each in kubernetes_objects}
    assert namespaces == {section.namespace}


def test_server_has_only_the_rights_that_it_needs_in_kubernetes(kubernetes_objects: list[dict]):
    granted = {
        Permission(verb, group, resource, is_namespaced=each["kind"] == "Role")
        for each in kubernetes_objects
        for rule in each.get("rules", [])
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert granted == set(PERMISSIONS)
    for each in kubernetes_objects:
        assert all(subject["name"] == "sandbox-server" for subject in each.get("subjects", []))


def test_image_contains_the_command_of_workers(root: Path):
    program, _, script = KUBERNETES_WORKER_COMMAND
    assert "tini" in (root / "packaging" / "Containerfile").read_text()
    assert program == "/usr/bin/tini"
    assert (root / Path(script).relative_to("/opt/sandbox")).stat().st_mode & 0o111


@pytest.fixture
def workflow(root: Path) -> dict:
    return yaml.safe_load((root / ".github" / "workflows" / "sandbox-task.yml").read_text())


def test_workflow_scripts_contain_no_expressions(workflow: dict):
    scripts = [step["run"] for step in workflow["jobs"]["task"]["steps"] if "run" in step]
    assert len(scripts) == 4
    assert [script for script in scripts if "${{" in script] == []


def test_workflow_has_minimal_permissions_and_rejects_forks(workflow: dict):
    assert workflow["permissions"] == {"contents": "read", "pull-requests": "write"}
    assert "head.repo.full_name == github.repository" in workflow["jobs"]["task"]["if"]


def test_workflow_pins_actions_to_commits(workflow: dict):
    actions = [step["uses"] for step in workflow["jobs"]["task"]["steps"] if "uses" in step]
    assert len(actions) == 2
    assert [action for action in actions if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action)] == []


def test_workflow_uses_exactly_its_declared_inputs(root: Path, workflow: dict):
    text = (root / ".github" / "workflows" / "sandbox-task.yml").read_text()
    call_interface = workflow[True]["workflow_call"]  # YAML 1.1 parses `on` as true
    assert set(re.findall(r"inputs\.(\w+)", text)) == set(call_interface["inputs"])
    assert set(re.findall(r"secrets\.(\w+)", text)) == set(call_interface["secrets"])


def test_workflow_scripts_are_valid_shell_and_git_config(workflow: dict, tmp_path: Path):
    scripts = {step.get("name"): step["run"] for step in workflow["jobs"]["task"]["steps"] if "run" in step}
    for script in scripts.values():
        subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=30)
    printf = scripts["Start a server"].split("sudo mkdir")[1].split("\n", 1)[1].split("|\n")[0]
    environment = {"PATH": "/usr/bin:/bin", "CLONE_HOST": "https://github.com", "CLONE_TOKEN": "t0ken"}
    written = subprocess.run(["bash", "-c", printf], env=environment, capture_output=True, check=True, timeout=30)
    (tmp_path / "gitconfig").write_bytes(written.stdout)
    list_command = ["git", "config", "--file", str(tmp_path / "gitconfig"), "--list"]
    output = subprocess.run(list_command, capture_output=True, text=True, check=True, timeout=30).stdout
    assert output == "url.https://x-access-token:t0ken@github.com/.insteadof=https://github.com/\n"


def test_links_on_the_deployment_page_are_valid(root: Path):
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", (root / "docs" / "deployment.md").read_text())
    assert targets
    assert [target for target in targets if not (root / "docs" / target).exists()] == []


def test_setup_from_a_wheel_installs_the_same_packages_as_the_script(root: Path):
    script = (root / "script" / "setup").read_text().split("missing_packages() {")[1].split("if [ ")[0]
    assert set(PACKAGES.values()) == set(re.findall(r"\|\| echo ([a-z0-9-]+)", script))


def test_wheel_contains_the_data_files(root: Path, tmp_path: Path):
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=root, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("sandbox-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    source = root / "src"
    data = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.suffix in DATA_SUFFIXES}
    assert len(data) > 10
    assert data - names == set()
    assert {"sandbox/runtimes/npm/package.json", "sandbox/runtimes/npm/package-lock.json"} <= names
    assert {f"sandbox/dashboard/guide/{name}.md" for name in GUIDE_PAGES} <= names
