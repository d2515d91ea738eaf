"""Sphinx extension: serve MathJax from the book itself, so that no page asks elsewhere.

The package sphinx-mathjax-offline carries all of MathJax 3 (24 MB). The pages need the
TeX-to-HTML script and its fonts (2 MB), so we copy those.
"""

import importlib.util
from pathlib import Path
from shutil import copytree

from sphinx.application import Sphinx

SCRIPT = "tex-chtml.js"
FONTS = "output/chtml/fonts/woff-v2"


def mathjax_folder() -> Path:
    """Where the package keeps MathJax; raises FileNotFoundError if it is not there."""
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "MathJax: the package sphinx-mathjax-offline is not installed; "
            'run "make book", which installs it'
        )
    return Path(spec.origin).parent / "static" / "mathjax"


def copy_mathjax(app: Sphinx, exception: Exception | None) -> None:
    if exception is not None or app.builder.format != "html":
        return
    source, target = mathjax_folder(), Path(app.outdir) / "_static" / "mathjax"
    target.mkdir(parents=True, exist_ok=True)
    (target / SCRIPT).write_bytes((source / SCRIPT).read_bytes())
    copytree(source / FONTS, target / FONTS, dirs_exist_ok=True)


def setup(app: Sphinx) -> dict:
    app.config.mathjax_path = f"mathjax/{SCRIPT}"
    app.connect("build-finished", copy_mathjax)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
