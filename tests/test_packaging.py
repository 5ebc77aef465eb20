"""The built wheel, installed in an empty environment and used outside of the source tree."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from ports import free_port
from server_process import get_status, running

from llmproxy import __version__, config

ROOT = Path(__file__).parent.parent
SOURCES = ("LICENSE", "README.md", "pyproject.toml", "setup.cfg", "llmproxy", "twisted")


def _run(command: Sequence[str | Path], cwd: Path) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env=_environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources alone: nothing built before is in it."""
    tree = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, tree)
    # The tools that build it are installed with the tests: nothing is fetched.
    _run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"], tree)
    [built] = (tree / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts' folder of an environment with the wheel, and the dependencies that are here."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", symlinks=True, with_pip=False)
    [packages] = (folder / "venv" / "lib").glob("python3*/site-packages")
    interpreter = folder / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    _run([*pip, "--python", interpreter, "install", "--no-deps", "--no-index", wheel], folder)
    # Where an editable llmproxy is installed too, it comes by a .pth file: those are read in this
    # folder, and not in one that is on the path because of them.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return interpreter.parent


@pytest.fixture
def scripts(installed: Path, tmp_path: Path) -> Path:
    """The same; and the folder where the test runs them holds nothing of ours."""
    show = "import llmproxy; print(llmproxy.__file__)"
    where = _run([installed / "python", "-c", show], tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)
    return installed


def test_the_wheel_has_the_plugin_and_the_data(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert "twisted/plugins/llmproxy_plugin.py" in names
    data = ("schema.sql", "config.toml", "openapi.json", "py.typed")
    assert {f"llmproxy/{name}" for name in data} <= names


def test_the_wheel_has_every_module(wheel: Path):
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "llmproxy").rglob("*.py")} | {
        "twisted/plugins/llmproxy_plugin.py"
    }
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if name.endswith(".py")} == modules


def test_the_wheel_makes_no_package_of_twisteds_plugins(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith("plugins/__init__.py")]


def test_the_wheel_says_its_version_and_licence(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = archive.read(name).decode()
    assert f"\nVersion: {__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata


def test_twistd_finds_the_plugin(scripts: Path, tmp_path: Path):
    assert "llmproxy" in _run([scripts / "python", "-m", "twisted", "--help"], tmp_path)


def test_the_default_configuration_is_written(scripts: Path, tmp_path: Path):
    _run([scripts / "python", "-m", "llmproxy", "--create-config"], tmp_path)
    written = tmp_path / "config.toml"
    assert written.read_text() == config.default_text()
    assert not stat.S_IMODE(written.stat().st_mode) & stat.S_IRWXO


def test_the_command_for_keys_is_there(scripts: Path, tmp_path: Path):
    assert "user" in _run([scripts / "llmproxyctl", "--help"], tmp_path)


def _write_config(folder: Path) -> tuple[int, int]:
    port, admin_port = free_port(), free_port()
    (folder / "proxy.toml").write_text(f"""
host = "127.0.0.1"
port = {port}
[admin]
listen = ["tcp:{admin_port}:interface=127.0.0.1"]
""")
    return port, admin_port


TWISTD = "import sys; from twisted.scripts.twistd import run; sys.exit(run())"


@pytest.mark.parametrize(
    "command",
    [
        ["python", "-c", TWISTD, "-n", "--pidfile=", "llmproxy", "-c", "proxy.toml"],
        ["python", "-m", "llmproxy", "-c", "proxy.toml"],
        ["llmproxy", "-c", "proxy.toml"],
    ],
    ids=["twistd", "module", "script"],
)
def test_the_installed_proxy_serves(command: list[str], scripts: Path, tmp_path: Path):
    port, admin_port = _write_config(tmp_path)
    with running(
        [scripts / command[0], *command[1:]],
        admin_port=admin_port,
        cwd=tmp_path,
        env=_environment(),
    ) as process:
        assert get_status(f"http://127.0.0.1:{port}/v1/models") == 401
        process.send_signal(signal.SIGHUP)
        assert get_status(f"http://127.0.0.1:{admin_port}/healthz") == 200
        assert get_status(f"http://127.0.0.1:{admin_port}/openapi.json") == 200
    assert (tmp_path / "db.sqlite").exists()
    assert not (tmp_path / "twistd.pid").exists()


def test_the_packages_are_those_of_the_tree():
    listed = (ROOT / "setup.cfg").read_text().split("packages =")[1].split("\n\n")[0].split()
    folders = {path.parent for path in (ROOT / "llmproxy").rglob("*.py")}
    found = {str(folder.relative_to(ROOT)).replace("/", ".") for folder in folders}
    assert set(listed) == found | {"twisted.plugins"}


def test_every_package_that_is_imported_is_a_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    listed = [*project["dependencies"], *extras["uvloop"]]
    named = {re.match(r"[\w.-]+", text)[0] for text in listed}  # type: ignore[index]
    dependencies = {_normal(name) for name in named}
    owners = importlib.metadata.packages_distributions()
    for path in (ROOT / "llmproxy").rglob("*.py"):
        for top in set(_imported(path)) - sys.stdlib_module_names - {"llmproxy"}:
            assert {_normal(owner) for owner in owners[top]} & dependencies, f"{path.name}: {top}"


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def test_a_wrong_option_ends_with_status_1(scripts: Path, tmp_path: Path):
    done = subprocess.run(
        [scripts / "python", "-m", "llmproxy", "--no-such-option"],
        cwd=tmp_path,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert "no-such-option" in done.stdout + done.stderr


def test_the_python_versions_are_those_of_the_tools():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["requires-python"] == ">=3.11"
    assert project["tool"]["mypy"]["python_version"] == "3.11"
