"""The canonical form of a rendered notebook: git sees changes, never noise."""

import base64
import copy
import io

import nbformat
from chapter import Chapter
from nbformat import NotebookNode
from nbstripout import strip_output
from PIL import Image

KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}
NOISE = [
    "metadata.jupytext",
    "metadata.widgets",
    "metadata.colab",
    "cell.metadata.colab",
    "cell.metadata.executionInfo",
    "cell.metadata.execution",
]


def normalised(chapter: Chapter) -> NotebookNode:
    """No editor metadata, one kernel name, small pictures, solutions folded."""
    notebook = strip_output(
        copy.deepcopy(chapter.notebook),
        keep_output=True,
        keep_count=True,
        keep_id=True,
        extra_keys=NOISE,
    )
    notebook.metadata = {
        "kernelspec": KERNELSPEC,
        "language_info": {"name": "python"},
        "pgcore": chapter.notebook.metadata.get("pgcore", {}),
    }
    for cell in notebook.cells:
        if "solution" in cell.metadata.get("tags", []) and cell.cell_type == "code":
            cell.metadata["mystnb"] = {"code_prompt_show": "Show one solution"}
            cell.metadata["jupyter"] = {"source_hidden": True}
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller_png(output.data["image/png"])
    nbformat.validate(notebook)
    return notebook


def smaller_png(encoded: str) -> str:
    """The same pixels on white, without metadata, as small as Pillow makes them.

    A picture that is so already stays as it is: another Pillow might pack it otherwise.
    So does one that moves: Pillow would keep the first of its frames.
    """
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        image.load()
        moves = getattr(image, "n_frames", 1) > 1
        if moves or (image.mode == "RGB" and not image.info):
            return encoded
        white = Image.new("RGBA", image.size, "white")
        pixels = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        pixels.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode() + "\n"
