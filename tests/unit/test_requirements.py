"""What is installed by requirements/ is what pyproject.toml allows and what the documents say."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_tip.machine import TESTED_MEGATRON

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def bounds(python: str) -> dict[str, SpecifierSet]:
    """The versions of every package that pyproject.toml allows with this Python."""
    requirements = map(Requirement, PROJECT["dependencies"])
    applies = {"python_version": python}
    return {one.name: one.specifier for one in requirements if one.marker is None or one.marker.evaluate(applies)}


def pins(name: str) -> dict[str, str]:
    """Packages and versions of `requirements/NAME.txt`, without what it includes."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    return dict(line.split("==", 1) for line in lines if "==" in line and not line.startswith("#"))


PINNED = pins("torch") | pins("cpu")
NEWEST = PINNED | pins("triton") | pins("newest")


@pytest.mark.parametrize("python, pinned", [("3.11", PINNED), ("3.12", NEWEST)])
def test_pyproject_allows_what_is_tested(python: str, pinned: dict[str, str]):
    for name, allowed in bounds(python).items():
        assert pinned[name] in allowed, f"{name} {pinned[name]}: {allowed}"


def test_pyproject_allows_no_megatron_between_the_tested_ones():
    assert (PINNED["megatron-core"], NEWEST["megatron-core"]) == TESTED_MEGATRON
    allowed = bounds("3.12")["megatron-core"]
    minors = [f"0.{minor}" for minor in range(30) if f"0.{minor}.1" in allowed]
    assert minors == [version.rpartition(".")[0] for version in TESTED_MEGATRON]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_the_pages_name_the_versions(page: str):
    named = set(re.findall(r"megatron-core (0\.\d+\.\d+)", (ROOT / page).read_text()))
    assert named == set(TESTED_MEGATRON)


DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_the_image_installs_what_readme_says():
    block = (ROOT / "README.md").read_text().partition("## Install for GPUs")[2].partition("\n## ")[0]
    says = re.findall(r"^    (pip install (?!\"torch).*)$", block, re.MULTILINE)  # of torch SGLang pins the version
    assert re.findall(r"^RUN (pip install .*)$", DOCKERFILE, re.MULTILINE) == says
    extras = {extra for command in says for found in re.findall(r"\.\[(.*)\]", command) for extra in found.split(",")}
    assert {"transformer-engine", "sglang"} <= extras <= PROJECT["optional-dependencies"].keys()


def test_the_image_has_a_python_that_the_project_allows():
    (python,) = set(re.findall(r"\bpython(3\.\d+)\b", DOCKERFILE))
    assert f"{python}.0" in SpecifierSet(PROJECT["requires-python"])


def test_the_image_gets_every_file_that_it_copies():
    copied = [name for names in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for name in names.split()]
    assert all((ROOT / name).exists() for name in copied)
    assert {"megatron_tip", "pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]} <= set(copied)
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert sent == set(copied)
