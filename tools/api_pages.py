"""Sphinx extension: the API page shows what a module defines, as its source has it.

AutoAPI takes the quotes off ``Float[Tensor, "*batch D"]``, and Sphinx cannot read the
star. We put them back. It lists imported names, too; those are described at home.
"""

import re
from typing import Any

from sphinx.application import Sphinx

SHAPED = re.compile(r"(?:jaxtyping\.)?(\w+)\[(?:torch\.)?Tensor, ([^\]]*)\]")


def with_quoted_shapes(text: str | None) -> str | None:
    return text and SHAPED.sub(r"\1[Tensor, '\2']", text)


def quote_shapes(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, args: str, result: str
) -> tuple[str | None, str | None]:
    return with_quoted_shapes(args), with_quoted_shapes(result)


def skip_imported(
    app: Sphinx, what: str, name: str, thing: Any, skip: bool, options: Any
) -> bool | None:
    return True if getattr(thing, "imported", False) else None


def setup(app: Sphinx) -> dict:
    app.connect("autodoc-process-signature", quote_shapes)
    app.connect("autodoc-skip-member", skip_imported)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
