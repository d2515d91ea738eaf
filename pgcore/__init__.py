"""pgcore: PaliGemma, built chapter by chapter by the book "PaliGemma from Scratch".

The alphabet: one letter, one meaning, in every signature, comment and figure.

    B  batch                      D  width (features of one token)
    T  query tokens               F  hidden width of an MLP
    S  key/value slots            V  vocabulary
    N  query heads                P  image tokens (patches)
    K  key/value heads            R  image side in pixels
    G  N / K, queries a KV head   C  colour channels
    H  head dim                   L  layers

Whole words (``"classes D"``) name what the alphabet has no letter for.
"""

__version__ = "0.1.0"

__all__ = [
    "PaliGemma",
    "PaliGemmaConfig",
    "Processor",
    "__version__",
    "generate",
    "load",
]

_HOMES = {
    "PaliGemma": "paligemma",
    "PaliGemmaConfig": "paligemma",
    "Processor": "processing",
    "generate": "api",
    "load": "api",
}


def __getattr__(name: str):
    """Import a public name when it is first asked for: importing pgcore stays quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pgcore' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"pgcore.{_HOMES[name]}"), name)
