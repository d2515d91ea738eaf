"""One-line errors for names that are not known."""

import difflib
from collections.abc import Collection


def unknown(kind: str, name: object, known: Collection[str]) -> ValueError:
    """Make the error for an unknown name; it suggests the nearest names.

    kind: what the name should have been, such as "style".
    known: the names that exist; all are listed if there are ten or fewer.
    """
    lowered = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(str(name).lower(), lowered, n=3)
    message = f"unknown {kind} {name!r}"
    if near:
        message += f": did you mean {' or '.join(repr(lowered[key]) for key in near)}?"
    if len(known) <= 10:
        return ValueError(f"{message} (known: {', '.join(known)})")
    first = ", ".join(list(known)[:3])
    return ValueError(f"{message} ({len(known)} are known: {first}, ...)")
