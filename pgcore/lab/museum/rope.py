# Generated from chapters/08_rotary_positions.ipynb.
# Edit the notebook, then run "make chapters".
"""Wrong twins from chapter 08, Rotary positions."""

from functools import partial

import torch

from pgcore.attention import Attention, merge_heads, split_heads


class TurnsItsOwnWay(Attention):
    """The layer of chapter 05 with ``turn`` where the right one was.

    As it stands it is right; its subclasses are not.
    """

    def turn(self, q, k, v, rotate):
        return rotate(q), rotate(k), v

    def forward(self, x, *, mask=None, rotate):
        q, k, v = (
            split_heads(project(x), self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k, v = self.turn(q, k, v, rotate)
        heads = self.attend(q, k, v, mask, self.scale)
        return self.o_proj(merge_heads(heads))


class ValuesTurnToo(TurnsItsOwnWay):
    """Values are turned as well: the output tells the place.

    Made up for this book.
    """

    def turn(self, q, k, v, rotate):
        return rotate(q), rotate(k), rotate(v)


def interleaved_pairs(x, cos, sin):
    """Pairs neighbours (2 i, 2 i + 1), as the paper draws them.

    Right for weights trained so, and wrong for Gemma's
    (huggingface/transformers, issue 25199, and seven more threads).
    """
    even, odd = x[..., ::2], x[..., 1::2]
    turned = even * cos - odd * sin, odd * cos + even * sin
    return torch.stack(turned, dim=-1).flatten(-2)


def angles_in_bfloat16(positions, head_dim, *, base=10_000.0):
    """Positions, speeds and their product are rounded to bfloat16.

    At position 4351 an angle is 10.7 radians off. (Done in
    EleutherAI/gpt-neox, issue 1003.)
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device)
    speeds = 1.0 / base ** (exponents.float() / head_dim)
    angles = positions[..., None].bfloat16() * speeds.bfloat16()
    return angles.float()


class SpeedsInABuffer(torch.nn.Module):
    """Keeps the speeds in a buffer: the model's cast takes them along.

    ``model.to(torch.bfloat16)`` rounds them, and no error is raised
    (nkalyanv99/UNI-D2, pull request 6).
    """

    def __init__(self, head_dim: int, base: float = 10_000.0):
        super().__init__()
        exponents = torch.arange(0, head_dim, 2).float() / head_dim
        self.register_buffer("speeds", 1.0 / base**exponents)

    def forward(self, positions):
        return positions[..., None].float() * self.speeds.float()


def exponent_off_by_one(positions, head_dim, *, base=10_000.0):
    """Speeds base ** (-(2 i + 2) / H): all hands one step too slow.

    Counts the pairs from 1, as the paper's formula does, and forgets
    that its exponent is 2 (i - 1). Made up for this book.
    """
    half = head_dim // 2
    pairs = torch.arange(1, half + 1, device=positions.device)
    return positions[..., None].float() * base ** (-pairs / half)


def layouts_mixed(x, cos, sin):
    """Angles for neighbours, halves swapped: no rotation.

    The two coordinates of a hand are turned by different angles
    (raiyanyahya/how-to-train-your-gpt, issue 6).
    """
    first, second = x.chunk(2, dim=-1)
    cos, sin = (t.repeat_interleave(2, dim=-1) for t in (cos, sin))
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class KeysTurnBackwards(TurnsItsOwnWay):
    """The sine's sign is changed for keys: scores know m + n.

    Made up for this book.
    """

    def turn(self, q, k, v, rotate):
        backwards = partial(rotate, sin=-rotate.keywords["sin"])
        return rotate(q), backwards(k), v


class TurnsTheStream(TurnsItsOwnWay):
    """Turns the layer's input; the projections mix the pairs again.

    Made up for this book.
    """

    def forward(self, x, *, mask=None, rotate):
        x = merge_heads(rotate(split_heads(x, self.head_dim)))
        return Attention.forward(self, x, mask=mask)
