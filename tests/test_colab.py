"""Do what Colab does: one notebook, an empty folder, a machine with torch but not us.

The notebook is run as it is. Git is told to fetch the repository's address from a
clone of this working tree, and ``google.colab`` exists, as it does there.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from chapter import ROOT, all_chapters, repository, select
from nbclient import NotebookClient

# As in its own list of March 2026 (googlecolab/backend-info), in our versions but
# where they matter: its transformers is older than what chapters compare with.
COLAB_HAS = [
    "torch", "numpy", "matplotlib", "pillow", "scipy", "scikit-learn", "safetensors",
    "sentencepiece", "tokenizers==0.22.2", "transformers==5.0.0",
    "ipykernel", "pip", "setuptools",
]  # fmt: skip
CHOSEN = os.environ.get("PGCORE_COLAB", "02")
CHAPTERS = all_chapters() if CHOSEN == "all" else select([CHOSEN])


def pinned(name: str) -> str:
    pins = (ROOT / "constraints.txt").read_text()
    match = re.search(rf"^({name}==[^ ;\n]+)", pins, flags=re.M)
    return match[1] if match else name


@pytest.fixture(scope="module")
def colab(tmp_path_factory) -> Path:
    """A virtual environment with what Colab has, and with ``google.colab``."""
    folder = tmp_path_factory.mktemp("colab")
    uv = [sys.executable, "-m", "uv"]
    subprocess.run(
        [*uv, "venv", "-q", "-p", sys.executable, folder / "env"], check=True
    )
    python = folder / "env" / "bin" / "python"
    wheels = os.environ.get("PIP_FIND_LINKS")
    find_links = ["--find-links", wheels] if wheels else []
    packages = [pinned(name) for name in COLAB_HAS]
    install = [*uv, "pip", "install", "-q", "-p", python, *find_links, *packages]
    subprocess.run(install, check=True)
    fake = next((folder / "env" / "lib").glob("python*/site-packages")) / "google/colab"
    fake.mkdir(parents=True)
    (fake / "__init__.py").touch()
    startup = folder / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "colab.py").write_text("import google.colab\n")
    return folder


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A repository with the working tree as it is, committed on the book's branch."""
    folder = tmp_path_factory.mktemp("clone")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    _, branch = repository()
    for name in filter(None, names.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*git, "init", "-q", "-b", branch], cwd=folder, check=True)
    subprocess.run([*git, "add", "-A"], cwd=folder, check=True)
    subprocess.run([*git, "commit", "-qm", "as it is"], cwd=folder, check=True)
    return folder


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda c: c.number)
def test_a_chapter_runs_as_in_colab(chapter, colab, clone, tmp_path, monkeypatch):
    notebook = nbformat.read(chapter.path, as_version=4)
    kernel = tmp_path / "kernels" / "colab"
    kernel.mkdir(parents=True)
    python = colab / "env" / "bin" / "python"
    (kernel / "kernel.json").write_text(
        f'{{"argv": ["{python}", "-m", "ipykernel_launcher", "-f", '
        '"{connection_file}"], "display_name": "Colab", "language": "python"}'
    )
    content = tmp_path / "content"
    content.mkdir()
    url, _ = repository()
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHONPATH", "VIRTUAL_ENV"))
    } | {
        "IPYTHONDIR": str(colab / "ipython"),
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{clone}.insteadOf",
        "GIT_CONFIG_VALUE_0": url,
    }
    before = installed(python)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="colab",
        resources={"metadata": {"path": str(content)}},
    )
    client.execute(env=environment)
    added = {name: v for name, v in installed(python).items() if before.get(name) != v}
    assert set(added) <= {
        "paligemma-from-scratch",
        "jaxtyping",
        "wadler-lindig",
        "beartype",
    }


def installed(python: Path) -> dict[str, str]:
    """Name and version of every package in an environment."""
    code = (
        "import importlib.metadata as m\n"
        "for d in m.distributions(): print(d.name.lower().replace('_', '-'), d.version)"
    )
    result = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True
    )
    return dict(line.split() for line in result.stdout.splitlines())
