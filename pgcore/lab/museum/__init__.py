"""The bug museum: every wrong twin of the book, once.

Each module here is generated from the cells of a chapter that begin with
``#| wrong``. The chapter shows the bug beside the right code; the tests assert that
each one fails the parity test that guards it; the exercise checks must reject it.
"""
