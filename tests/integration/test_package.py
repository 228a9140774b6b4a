"""The package as a user gets it who has no clone: sdist, wheel from it, installed beside nothing of the repository."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from megatron_tip import __version__
from megatron_tip.observability.run_folder import RunFolder
from tests.helpers.training import RUN_TOML, make_models

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples/quickstart_cpu/quickstart.toml"
BUILD = "import sys, setuptools.build_meta as build; print(getattr(build, 'build_' + sys.argv[1])(sys.argv[2]))"


def built(kind: str, source: Path, target: Path) -> Path:
    target.mkdir(exist_ok=True)
    command = [sys.executable, "-c", BUILD, kind, str(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the unpacked sdist, which is built from a copy: nothing is written into the repository."""
    folder = tmp_path_factory.mktemp("package")
    copy = folder / "copy"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "megatron_tip", copy / "megatron_tip", ignore=shutil.ignore_patterns("__pycache__"))
    sdist = built("sdist", copy, folder / "dist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return built("wheel", folder / f"megatron_tip-{__version__}", folder / "dist")


@pytest.fixture(scope="module")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`megatron-tip` of an environment of its own, which sees this one's other packages but not the repository."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    packages = next(folder.glob("lib/python3*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")  # whose own .pth files are not read
    script = folder / "bin" / "megatron-tip"
    script.write_text(f"#!{folder}/bin/python\nfrom megatron_tip.cli import main\nmain()\n")
    script.chmod(0o755)
    return script


def run(program: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([program, *arguments], cwd=cwd, env=environ, capture_output=True, text=True, check=False)


def test_the_wheel_has_every_file_of_the_package(wheel: Path):
    assert wheel.name == f"megatron_tip-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "megatron_tip").rglob("*") if path.is_file()}
    assert {name for name in ours if "__pycache__" not in name} <= names
    assert not any(name.startswith(("tests/", "tools/")) for name in names)
    assert f"megatron_tip-{__version__}.dist-info/licenses/LICENSE" in names


def test_the_quickstarts_configuration_can_run_from_another_folder(program: Path, tmp_path: Path):
    models = make_models(tmp_path / "models")
    paths = [f"model.path={models}/student", f"teacher.path={models}/student", "model.drop_layers=[1, 4]"]
    paths.append(f"prompts.path={QUICKSTART.with_name('capitals.jsonl')}")
    checked = run(program, "train", str(QUICKSTART), *paths, "--dry-run", cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    assert checked.stderr.splitlines()[-1] == "ok: this configuration can run here, on 3 workers"


def test_a_run_and_its_report_need_no_clone(program: Path, tmp_path: Path):
    models = make_models(tmp_path / "models")
    (tmp_path / "run.toml").write_text(RUN_TOML.format(folder="run", threads=2, models=models))
    done = run(program, "train", "run.toml", "training.steps=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert RunFolder(tmp_path / "run").hf.exists()
    page = run(program, "report", "run", cwd=tmp_path)
    assert page.returncode == 0, page.stderr
    assert "Warning" not in done.stderr  # of a library, which a user cannot act on
    assert str(ROOT) not in done.stderr
