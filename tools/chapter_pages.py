"""Sphinx extension: a chapter's marked cells carry a quiet note, not the directive.

``#| export`` tells the exporter where a cell goes. A reader sees
"goes into pgcore.numerics" above the cell instead.
"""

from pathlib import Path

from chapter import DIRECTIVE, Chapter
from docutils import nodes
from sphinx.application import Sphinx

NOTES = {
    "export": "goes into pgcore.{}",
    "reference": "kept as an oracle for the tests",
    "wrong": "wrong on purpose: goes into the bug museum",
}


def mark_cells(app: Sphinx, doctree: nodes.document) -> None:
    """Replace the directive line of each marked cell by a note above the cell."""
    path = Path(app.env.doc2path(app.env.docname))
    if path.suffix != ".ipynb":
        return
    chapter = Chapter(path)
    for block in list(doctree.findall(nodes.literal_block)):
        match = DIRECTIVE.match(block.astext() + "\n")
        if not match or "cell_input" not in block.parent.get("classes", []):
            continue
        text = block.astext()[match.end() :].lstrip("\n")
        block.children = [nodes.Text(text)]
        block.rawsource = text
        note = nodes.paragraph("", NOTES[match[1]].format(match[2] or chapter.module))
        note["classes"] = ["cell-note", f"cell-note-{match[1]}"]
        block.parent.insert(0, note)


def setup(app: Sphinx) -> dict:
    app.connect("doctree-read", mark_cells)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
