"""Checks of chapter 05, attention. The oracles are torch's fused kernel and loops."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pgcore.attention import Attention, attention_mask
from pgcore.lab.checks import exercise, require, require_close


def draw(*shapes: tuple[int, ...], seed: int) -> list[Tensor]:
    """Normal numbers that take gradients, one tensor a shape."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    return [tensor.requires_grad_() for tensor in drawn]


def head_by_torch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None):
    """The oracle: torch's fused kernel on one head."""
    q, k, v = (tensor[None, None] for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0, 0]


SIZES = ((4, 4, 8), (3, 7, 5), (6, 1, 2), (1, 9, 72))  # T, S, H


@exercise("05.1")
def head_is_torchs(one_head):
    """equals torch's kernel, with as many keys as you like"""
    for T, S, H in SIZES:
        q, k, v = draw((T, H), (S, H), (S, H), seed=T)
        require_close(
            one_head(q, k, v),
            head_by_torch(q, k, v),
            f"T = {T}, S = {S}, H = {H}: softmax over keys, divide by sqrt(H).",
            atol=1e-5,
        )


@exercise("05.1")
def head_ignores_the_order_of_keys(one_head):
    """does not change when keys and values are shuffled together"""
    q, k, v = draw((5, 8), (9, 8), (9, 8), seed=1)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    require_close(one_head(q, k[order], v[order]), one_head(q, k, v), atol=1e-5)


@exercise("05.1")
def head_averages(one_head):
    """returns a value that all keys share"""
    q, k, v = draw((5, 8), (9, 8), (1, 8), seed=3)
    expected = v.expand(5, 8)
    hint = "The weights of a query must sum to 1."
    require_close(one_head(q, k, v.expand(9, 8)), expected, hint, atol=1e-5)


def masks(T: int, S: int, seed: int) -> list[Tensor]:
    """A random mask, the same with empty rows, and one that allows all."""
    random = torch.rand(T, S, generator=torch.Generator().manual_seed(seed)) < 0.6
    some_empty = random.clone()
    some_empty[::2] = False
    return [random, some_empty, torch.ones(T, S, dtype=torch.bool)]


@exercise("05.2")
def masked_head_is_torchs(masked_head):
    """equals torch's kernel for any mask, empty rows included"""
    for T, S, H in SIZES:
        q, k, v = draw((T, H), (S, H), (S, H), seed=S)
        for mask in masks(T, S, seed=T):
            expected = torch.where(
                mask.any(1, keepdim=True), head_by_torch(q, k, v, mask), 0.0
            )
            hint = f"{int(mask.sum())} of {mask.numel()} pairs allowed."
            require_close(masked_head(q, k, v, mask), expected, hint, atol=1e-5)


@exercise("05.2")
def masked_head_learns_from_what_it_reads(masked_head):
    """has torch's gradients where it reads, and zero where it does not"""
    for seed, mask in enumerate(masks(6, 5, seed=7)):
        q, k, v = inputs = draw((6, 4), (5, 4), (5, 4), seed=seed)
        push = draw((6, 4), seed=9)[0].detach()
        push = push * mask.any(1, keepdim=True)
        ours = torch.autograd.grad((masked_head(*inputs, mask) * push).sum(), inputs)
        oracle = head_by_torch(q, k, v, mask | ~mask.any(1, keepdim=True))
        expected = torch.autograd.grad((oracle * push).sum(), inputs)
        for name, slope, wanted in zip("qkv", ours, expected, strict=True):
            hint = f"Gradient of {name}, {int((~mask.any(1)).sum())} empty rows."
            require_close(slope, wanted, hint, atol=1e-5)


@exercise("05.2")
def hidden_keys_do_not_matter(masked_head):
    """does not change when a hidden key does"""
    q, k, v = (tensor.detach() for tensor in draw((4, 8), (6, 8), (6, 8), seed=4))
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[:, 2] = False
    expected = masked_head(q, k, v, mask)
    k[2], v[2] = 50.0, -1e4
    require_close(masked_head(q, k, v, mask), expected, atol=1e-5)


@exercise("05.3")
def mixed_heads_are_a_linear_layer(mix_heads):
    """equals nn.Linear on the heads side by side"""
    for B, N, T, H, D in ((1, 2, 3, 4, 8), (2, 3, 5, 4, 7), (3, 8, 2, 2, 5)):
        heads, weight = draw((B, N, T, H), (D, N * H), seed=N)
        expected = F.linear(heads.transpose(1, 2).reshape(B, T, N * H), weight)
        hint = f"N = {N}, H = {H}, D = {D}: features n H to (n + 1) H are head n."
        require_close(mix_heads(heads, weight), expected, hint, atol=1e-4)


@exercise("05.3")
def mixed_heads_add_up(mix_heads):
    """is the sum of what single heads write"""
    heads, weight = draw((2, 4, 3, 5), (6, 20), seed=5)
    total = torch.zeros(2, 3, 6)
    for n in range(4):
        alone = torch.zeros_like(heads)
        alone[:, n] = heads[:, n]
        total = total + mix_heads(alone, weight)
    require_close(mix_heads(heads, weight), total, atol=1e-4)


def run_head(matrices: tuple[Tensor, ...], tokens: Tensor) -> Tensor:
    """One causal head with given matrices, over rows of tokens."""
    q, k, v = (tokens @ matrix for matrix in matrices)
    length = len(tokens)
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    scores = (q @ k.T * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, dim=-1) @ v


@exercise("05.4")
def matrices_have_the_shapes(copy_previous):
    """returns three matrices that fit the tokens"""
    w_q, w_k, w_v = copy_previous(5, 9)
    shapes = [tuple(w.shape) for w in (w_q, w_k, w_v)]
    require(
        w_q.shape == w_k.shape and len(w_q) == 14 and shapes[2] == (14, 5),
        f"expected (14, H), (14, H), (14, 5) for 5 letters and 9 places, got {shapes}",
    )


@exercise("05.4")
def previous_letters_are_copied(copy_previous):
    """copies the previous letter, in random texts of any length"""
    for letters, length, seed in ((5, 9, 0), (2, 4, 1), (26, 40, 2), (3, 2, 3)):
        matrices = copy_previous(letters, length)
        generator = torch.Generator().manual_seed(seed)
        for used in {length, max(2, length // 2)}:
            ids = torch.randint(letters, (used,), generator=generator)
            letter = F.one_hot(ids, letters).float()
            tokens = torch.cat((letter, torch.eye(length)[:used]), dim=1)
            require_close(
                run_head(matrices, tokens)[1:],
                letter[:-1],
                f"{letters} letters, {length} places, a text of {used}. "
                "Are the scores large enough, after the division?",
                rtol=0,
                atol=1e-3,
            )


@exercise("05.4")
def letters_do_not_steer(copy_previous):
    """decides where to read by place alone"""
    w_q, w_k, _ = copy_previous(4, 6)
    scores = w_q @ w_k.T
    letters = scores[4:, :4], scores[:4, 4:], scores[:4, :4]
    require(
        max(part.abs().max() for part in letters) <= 1e-6 * scores.abs().max(),
        "letters take part in the scores; another text may lead the head astray",
    )


def rows_of_documents() -> list[Tensor]:
    """Packed rows: rising numbers, all equal, and numbers that return."""
    rows = ([[0, 0, 0, 1, 1, 2]], [[4] * 5], [[2, 2, 0, 0, 1], [7, 7, 7, 7, 3]])
    return [torch.tensor(row) for row in rows] + [torch.tensor([[1, 0, 1, 0, 0, 1]])]


@exercise("05.5")
def packed_mask_is_right(packed_mask):
    """allows the pairs of one document, backwards in time only"""
    for document in rows_of_documents():
        expected = torch.zeros(len(document), 1, *2 * document.shape[1:]).bool()
        for b, row in enumerate(document.tolist()):
            for i, mine in enumerate(row):
                for j, yours in enumerate(row[: i + 1]):
                    expected[b, 0, i, j] = mine == yours
        mask = packed_mask(document)
        require(mask.dtype == torch.bool, f"expected booleans, got {mask.dtype}")
        require_close(mask, expected, f"Documents {document.tolist()}.")


@exercise("05.5")
def packing_changes_nothing(packed_mask):
    """gives each document the output that it has on its own"""
    generator = torch.Generator().manual_seed(6)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = Attention(12, num_heads=4, num_kv_heads=2, head_dim=5)
    for document in rows_of_documents():
        x = torch.randn(*document.shape, 12, generator=generator)
        packed = layer(x, mask=packed_mask(document))
        for b, row in enumerate(document):
            for name in row.unique():
                alone = x[b : b + 1, row == name]
                starts = torch.ones(alone.shape[:2], dtype=torch.bool)
                expected = layer(alone, mask=attention_mask(starts))
                hint = f"Document {name.item()} of {row.tolist()}."
                require_close(packed[b : b + 1, row == name], expected, hint, atol=1e-5)
