"""Print the requirements of one extra of pyproject.toml, without the package's own.

    python tools/requirements.py book

The book is built from committed outputs: it needs this list, but neither pgcore nor
torch.
"""

import sys
import tomllib
from pathlib import Path

if __name__ == "__main__":
    pyproject = Path(__file__).resolve().parents[1] / "pyproject.toml"
    extras = tomllib.loads(pyproject.read_text())["project"]["optional-dependencies"]
    print("\n".join(extras[sys.argv[1]]))
