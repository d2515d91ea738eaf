"""Sphinx extension: shapes in the API page look as they do in the source.

AutoAPI takes the quotes off ``Float[Tensor, "*batch D"]``, and Sphinx cannot read the
star. We put them back.
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


def setup(app: Sphinx) -> dict:
    app.connect("autodoc-process-signature", quote_shapes)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
