"""Where one box lies from another: left of, right of, above, below, or in doubt.

Boxes are (top, left, bottom, right) in pixels, half open. All in integers.
"""

Box = tuple[int, int, int, int]

DIRECTIONS = ("left of", "right of", "above", "below")


def _offset(box: Box, other: Box, direction: str) -> tuple[int, int, int]:
    """Measure, in half pixels, how far the centre of box lies from that of other.

    Returns: along the direction, across it, and how far the centre of box lies
    beyond the edge of other.
    """
    down = box[0] + box[2] - other[0] - other[2]
    right = box[1] + box[3] - other[1] - other[3]
    along, across = (right, down) if direction.endswith("of") else (down, right)
    if direction in ("left of", "above"):
        along = -along
    half = other[3] - other[1] if direction.endswith("of") else other[2] - other[0]
    return along, abs(across), along - half


def is_clearly(box: Box, direction: str, other: Box, size: int) -> bool:
    """Tell whether nobody would doubt that box lies in this direction from other.

    Its centre lies beyond the edge of other by 1/32 of the picture's side or more, and
    at least 1.5 times as far along the direction as across it.
    """
    along, across, beyond = _offset(box, other, direction)
    return 16 * beyond >= size and 2 * along >= 3 * across


def is_possibly(box: Box, direction: str, other: Box) -> bool:
    """Tell whether somebody might say that box lies in this direction from other.

    Its centre lies that way at all, and not 1.5 times as far across.
    """
    along, across, _ = _offset(box, other, direction)
    return along > 0 and 3 * along > 2 * across
