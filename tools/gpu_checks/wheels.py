"""The packages that a machine without a network lacks: fetched as wheels here, installed there from a folder."""

import subprocess
import sys
from pathlib import Path

from megatron_tip import __version__

# What a machine with torch, transformers and pytest still lacks; megatron-core's wheel has a compiled helper.
NEEDED = (
    *("megatron-core", "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions"),
    *("tenacity", "tomli-w"),
)
LIGER = "liger-kernel==0.8.5"
PINS = Path(__file__).parents[2] / "requirements/cpu.txt"
_PYTHON = "3.12"
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def collect(folder: Path) -> list[str]:
    """Fetches the wheels for Python 3.12 on x86-64 from the package index; returns their names. Needs a network."""
    folder.mkdir(parents=True, exist_ok=True)
    platforms = [option for platform in _PLATFORMS for option in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    chosen = ["--python-version", _PYTHON, "--implementation", "cp", *platforms, "--dest", str(folder)]
    subprocess.run([*command, *chosen, *pinned(PINS.read_text()), LIGER], check=True)
    return sorted(path.name for path in folder.glob("*.whl"))


def pinned(requirements: str) -> list[str]:
    """Returns the lines of `requirements` for the packages of NEEDED."""
    pins = dict(line.split("==", 1) for line in requirements.splitlines() if "==" in line and line[0] != "#")
    return [f"{name}=={pins[name]}" for name in NEEDED]


def describe_package(target: Path) -> None:
    """Writes into `target` what says that this checkout is installed: a checkpoint records the version."""
    described = target / f"megatron_tip-{__version__}.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: megatron_tip\nVersion: {__version__}\n")


def install(folder: Path, target: Path) -> None:
    """Installs the wheels of `folder` into `target`, without a network and without their dependencies.

    Raises:
        FileNotFoundError: the folder has no wheels.
    """
    wheels = sorted(str(path) for path in folder.glob("*.whl"))
    if not wheels:
        raise FileNotFoundError(f"{folder}: expected wheels, found none; make them with --collect-wheels {folder}")
    quiet = ["--quiet", "--disable-pip-version-check", "--no-compile", "--no-cache-dir"]
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", *quiet, "--target", str(target)]
    subprocess.run([*command, *wheels], check=True)
