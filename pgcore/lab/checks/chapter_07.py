"""Checks of chapter 07, contrastive pretraining. Oracles: modules, loops, torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pgcore.lab.checks import exercise, require, require_close
from pgcore.siglip import SO400M_TEXT, TINY_TEXT, TextConfig, TextTower
from pgcore.vision import MAPHead, VisionConfig


@exercise("07.1")
def count_of_presets(count):
    """counts the text towers of this chapter"""
    for name, config in (("TINY_TEXT", TINY_TEXT), ("SO400M_TEXT", SO400M_TEXT)):
        require_count(count, config, name)


@exercise("07.1")
def count_of_odd_sizes(count):
    """counts towers in which no two sizes are the same"""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        draw = torch.randint(2, 30, (7,), generator=generator).tolist()
        vocab_size, max_length, depth, mlp_dim, heads, head_dim, projection = draw
        config = TextConfig(
            vocab_size=vocab_size,
            max_length=max_length,
            width=heads * head_dim,
            depth=depth,
            mlp_dim=mlp_dim,
            num_heads=heads,
            head_dim=head_dim,
            projection_dim=projection,
        )
        require_count(count, config, str(config))


def require_count(count, config: TextConfig, name: str) -> None:
    """Compare with a tower built on the meta device."""
    with torch.device("meta"):
        tower = TextTower(config)
    expected = sum(p.numel() for p in tower.parameters())
    found = count(config)
    require(
        found == expected,
        f"{name}: expected {expected:,}, got {found:,}. "
        f"The difference is {found - expected:+,}",
    )


def draw_matches(rows: int, columns: int, levels: int, seed: int):
    """Logits with ties, and which texts belong to which picture: one or more."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(levels, (rows, columns), generator=generator).float()
    is_match = torch.rand(rows, columns, generator=generator) < 0.2
    is_match[range(rows), torch.randint(columns, (rows,), generator=generator)] = True
    return logits, is_match


def recall_by_loops(logits: Tensor, is_match: Tensor, k: int) -> Tensor:
    """The oracle: sort each row, wrong texts before right ones of the same score."""
    hits = 0
    for scores, right in zip(logits.tolist(), is_match.tolist(), strict=True):
        ranked = sorted(zip(scores, right, strict=True), key=lambda x: (-x[0], x[1]))
        hits += any(is_right for _, is_right in ranked[:k])
    return torch.tensor(hits / len(logits))


@exercise("07.2")
def recall_is_the_loops(recall):
    """equals sorting each row, without ties and with them"""
    for seed, levels in ((0, 100_000), (1, 4), (2, 2)):
        logits, is_match = draw_matches(30, 12, levels, seed)
        for k in (1, 3, 12):
            require_close(
                torch.as_tensor(recall(logits, is_match, k), dtype=torch.float),
                recall_by_loops(logits, is_match, k),
                f"{levels} different scores, k = {k}.",
            )


@exercise("07.2")
def recall_of_several_is_a_hit_rate(recall):
    """is 1 if one of five right texts comes first"""
    logits = torch.arange(10.0).flip(0).repeat(4, 1)
    is_match = torch.zeros(4, 10, dtype=torch.bool)
    is_match[:, [0, 6, 7, 8, 9]] = True
    found = torch.as_tensor(recall(logits, is_match, 1), dtype=torch.float)
    require_close(found, torch.tensor(1.0), "One right text is enough.")


@exercise("07.2")
def recall_of_a_constant(recall):
    """is 0 for equal scores, as long as k wrong texts exist"""
    is_match = torch.eye(6, 8, dtype=torch.bool)
    found = torch.as_tensor(recall(torch.zeros(6, 8), is_match, 7), dtype=torch.float)
    require_close(found, torch.tensor(0.0), "A tie with a wrong text counts against.")


@exercise("07.3")
def ensemble_is_the_mean_direction(ensemble):
    """equals the direction of the sum of unit vectors"""
    for seed, shape in ((3, (4, 7, 16)), (4, (2, 1, 3)), (5, (1, 5, 8))):
        generator = torch.Generator().manual_seed(seed)
        vectors = torch.randn(shape, generator=generator)
        vectors = vectors * torch.rand(shape[:2], generator=generator)[..., None] * 9
        total = torch.stack([F.normalize(one, dim=1) for one in vectors]).sum(0)
        require_close(ensemble(vectors), total / total.norm(dim=1, keepdim=True))


@exercise("07.3")
def ensemble_ignores_length(ensemble):
    """does not change when one sentence's vectors get longer"""
    vectors = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(6))
    longer = vectors.clone()
    longer[1] *= 100
    require_close(ensemble(longer), ensemble(vectors), "Normalise before the mean.")


def pooling_head() -> tuple[MAPHead, Tensor, Tensor]:
    """A head with weights at fan-in scale, nine patches, and a text."""
    config = VisionConfig(
        width=24,
        depth=1,
        mlp_dim=40,
        num_heads=3,
        head_dim=8,
        patch_size=4,
        image_size=12,
    )
    generator = torch.Generator().manual_seed(7)
    head = MAPHead(config).requires_grad_(False)
    for weight in head.parameters():
        fan_in = weight[0].numel() if weight.ndim > 1 else 4
        weight.normal_(std=fan_in**-0.5, generator=generator)
    tokens = torch.randn(9, 24, generator=generator)
    return head, tokens, torch.randn(24, generator=generator)


@exercise("07.4")
def patches_one_by_one(without):
    """equals leaving out the patches one at a time"""
    pool, tokens, text = pooling_head()
    whole = F.cosine_similarity(pool(tokens[None])[0], text, dim=0)
    falls = []
    for patch in range(len(tokens)):
        rest = torch.cat([tokens[:patch], tokens[patch + 1 :]])
        falls.append(whole - F.cosine_similarity(pool(rest[None])[0], text, dim=0))
    hint = "Leave the patch out; do not set it to zero. Whole minus rest."
    require_close(without(pool, tokens, text), torch.stack(falls), hint, atol=1e-5)


@exercise("07.4")
def patches_that_are_equal(without):
    """gives 0 everywhere if all patches are the same"""
    pool, tokens, text = pooling_head()
    same = tokens[:1].expand(9, -1)
    require_close(without(pool, same, text), torch.zeros(9), atol=1e-5)


@exercise("07.4")
def patches_follow_their_order(without):
    """moves with the patches: the pooling head knows no places"""
    pool, tokens, text = pooling_head()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(8))
    require_close(
        without(pool, tokens[order], text),
        without(pool, tokens, text)[order],
        atol=1e-5,
    )
