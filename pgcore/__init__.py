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

__all__ = ["__version__"]
