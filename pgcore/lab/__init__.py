"""What a classroom needs around the model: data, figures, checks, and the bug museum.

``%load_ext pgcore.lab`` is the one magic line of every chapter. It sets the book's
figure style and makes the shape annotations of the functions you define in the
notebook real: a call with the wrong shape fails at once, and says which.
"""

from typing import Any


def load_ipython_extension(ipython: Any) -> None:
    """Called by ``%load_ext pgcore.lab``; not meant to be called by hand."""
    from pgcore.lab.figures import use_book_style

    use_book_style()
    ipython.extension_manager.load_extension("jaxtyping")
    ipython.run_line_magic("jaxtyping.typechecker", "beartype.beartype")
