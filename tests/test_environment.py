"""environment.yml, pyproject.toml and constraints.txt agree."""

import re
import tomllib

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.conftest import ROOT

CONDA_NAMES = {
    "torch": "pytorch",
    "huggingface-hub": "huggingface_hub",
    "matplotlib": "matplotlib-base",
    "playwright": "playwright-python",
}
CONDA_ONLY = {"python", "pip"}
FIXED_PACKAGES = {
    "torch", "jupyter-book", "jupyterlab", "numpy", "matplotlib", "pillow",
    "safetensors", "nbval",
}  # fmt: skip


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pip_requirements() -> dict[str, SpecifierSet]:
    lists = [project()["dependencies"], *project()["optional-dependencies"].values()]
    requirements = [Requirement(text) for texts in lists for text in texts]
    return {
        canonicalize_name(r.name): r.specifier
        for r in requirements
        if r.name != project()["name"]
    }


def conda_requirements() -> dict[str, SpecifierSet]:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    texts = []
    for dependency in environment["dependencies"]:
        texts += dependency["pip"] if isinstance(dependency, dict) else [dependency]
    requirements = [Requirement(text) for text in texts if text != "-e ."]
    return {r.name: r.specifier for r in requirements}


def constraints() -> dict[str, list[tuple[Version, str]]]:
    pinned: dict[str, list] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if match := re.match(r"([a-z0-9._-]+)==([^ ;]+)\s*(;.*)?$", line):
            pinned.setdefault(match[1], []).append((Version(match[2]), line))
    return pinned


def test_conda_and_pip_name_the_same_packages_and_bounds():
    conda = conda_requirements()
    wanted = {CONDA_NAMES.get(n, n): bounds for n, bounds in pip_requirements().items()}
    assert set(conda) - CONDA_ONLY == set(wanted)
    for name, bounds in wanted.items():
        assert conda[name] == bounds, name


def test_conda_python_is_allowed():
    assert conda_requirements()["python"] == SpecifierSet(project()["requires-python"])


def test_the_packages_that_the_project_is_fixed_to_are_there():
    assert set(pip_requirements()) >= FIXED_PACKAGES


def test_bounds_of_the_package_itself_are_lower_bounds_only():
    """Colab brings its own torch and numpy: an upper bound would replace them."""
    for text in project()["dependencies"]:
        operators = {s.operator for s in Requirement(text).specifier}
        assert operators == {">="}, text


def test_every_requirement_is_pinned_within_its_bounds():
    pinned = constraints()
    for name, bounds in pip_requirements().items():
        assert name in pinned, f"{name} is missing in constraints.txt"
        for version, line in pinned[name]:
            assert version in bounds, line


def test_no_pin_names_an_address():
    assert "://" not in (ROOT / "constraints.txt").read_text().replace("# ", "")
