"""Checks of chapter 10, Gemma. The oracles are torch, and pgcore's own Gemma."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pgcore.attention import attention_mask
from pgcore.gemma import GEMMA2_2B, GEMMA2_27B, GEMMA_2B, GEMMA_7B, Gemma, GemmaConfig
from pgcore.kv_cache import KVCache
from pgcore.lab.checks import exercise, require, require_close
from pgcore.lab.museum.gemma import TWINS, with_bug

# Two layers, every part of Gemma 2, and no two sizes equal by chance.
CONFIG = GemmaConfig(
    width=40,
    depth=2,
    mlp_dim=72,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    vocab_size=97,
    query_scale=20**-0.5,
    attention_softcap=2.0,
    final_softcap=3.0,
    window=5,
    post_norms=True,
)


def draw(*shapes: tuple[int, ...], seed: int) -> list[Tensor]:
    """Normal numbers that take gradients, one tensor a shape."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    return [tensor.requires_grad_() for tensor in drawn]


@exercise("10.1")
def geglu_is_torchs(geglu):
    """equals torch's layers, for any sizes and any axes in front"""
    for front, D, width in (((), 4, 6), ((3,), 7, 5), ((2, 3), 5, 9)):
        x, gate, up, down = draw(
            (*front, D), (width, D), (width, D), (D, width), seed=D
        )
        bent = F.gelu(F.linear(2 * x, gate), approximate="tanh")
        expected = F.linear(bent * F.linear(2 * x, up), down)
        hint = "gelu(gate x) times up x, then down; the GELU is the tanh one."
        require_close(geglu(2 * x, gate, up, down), expected, hint, atol=2e-6)


@exercise("10.1")
def a_closed_gate_passes_nothing(geglu):
    """is zero where the gate is, and doubles when up doubles"""
    x, gate, up, down = (
        t.detach() for t in draw((3, 4), (6, 4), (6, 4), (4, 6), seed=1)
    )
    require_close(geglu(x, 0 * gate, up, down), torch.zeros(3, 4), "The gate is zero.")
    twice = 2 * geglu(x, gate, up, down)
    require_close(geglu(x, gate, 2 * up, down), twice, "up is not bent.")


def random_masks(T: int, S: int, seed: int) -> list[Tensor]:
    """A random mask, the same with empty rows, and one that allows all."""
    random = torch.rand(T, S, generator=torch.Generator().manual_seed(seed)) < 0.6
    some_empty = random.clone()
    some_empty[::2] = False
    return [random, some_empty, torch.ones(T, S, dtype=torch.bool)]


def weights_by_loops(scores: Tensor, mask: Tensor, cap: float) -> Tensor:
    """The oracle: a softmax over those scores alone that may be read."""
    weights = torch.zeros_like(scores)
    for row in range(len(scores)):
        readable = mask[row].nonzero().squeeze(1)
        if len(readable):
            capped = cap * torch.tanh(scores[row, readable] / cap)
            weights[row, readable] = torch.softmax(capped, dim=0)
    return weights


@exercise("10.2")
def weights_are_right(capped_weights):
    """equals a softmax over the readable scores alone, empty rows included"""
    for T, S, cap in ((4, 4, 2.0), (3, 7, 50.0), (1, 9, 0.5), (6, 2, 5.0)):
        scores = 3 * draw((T, S), seed=S)[0].detach()
        for mask in random_masks(T, S, seed=T):
            expected = weights_by_loops(scores, mask, cap)
            hint = f"{int(mask.sum())} of {mask.numel()} pairs allowed, cap {cap}."
            require_close(capped_weights(scores, mask, cap), expected, hint)


@exercise("10.2")
def gradients_are_right(capped_weights):
    """has the right gradients, and none where a row may read nothing"""
    for seed, mask in enumerate(random_masks(6, 5, seed=7)):
        (scores,) = draw((6, 5), seed=seed)
        push = draw((6, 5), seed=9)[0].detach()
        found, expected = (
            torch.autograd.grad((way(scores, mask, 2.0) * push).sum(), scores)[0]
            for way in (capped_weights, weights_by_loops)
        )
        require_close(found, expected, f"{int((~mask.any(1)).sum())} empty rows.")


@exercise("10.2")
def hidden_scores_do_not_matter(capped_weights):
    """does not change when a hidden score does"""
    scores = draw((4, 6), seed=4)[0].detach()
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[:, 2] = False
    expected = capped_weights(scores, mask, 1.5)
    for value in (-1e4, 1e4):
        changed = scores.clone()
        changed[:, 2] = value
        require_close(capped_weights(changed, mask, 1.5), expected)


def built(config: GemmaConfig) -> int:
    """The oracle: build it, without memory, and count."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in Gemma(config).parameters())


@exercise("10.3")
def published_sizes_are_right(count_parameters):
    """counts the published models"""
    for config in (GEMMA_2B, GEMMA_7B, GEMMA2_2B, GEMMA2_27B):
        found, expected = count_parameters(config), built(config)
        require(found == expected, f"{config}: expected {expected}, got {found}")


@exercise("10.3")
def any_sizes_are_right(count_parameters):
    """counts any other configuration"""
    generator = torch.Generator().manual_seed(0)
    for trial in range(8):
        n = torch.randint(1, 9, (7,), generator=generator).tolist()
        config = GemmaConfig(
            width=n[0],
            depth=n[1],
            mlp_dim=n[2],
            num_heads=n[3] * n[4],
            num_kv_heads=n[4],
            head_dim=2 * n[5],
            vocab_size=n[6],
            post_norms=trial % 2 == 0,
        )
        found, expected = count_parameters(config), built(config)
        require(found == expected, f"{config}: expected {expected}, got {found}")


Suspect = Callable[..., Tensor]


def runner(gemma: Gemma) -> Suspect:
    """A model as the exercise hands it out: ids in, logits out, nothing else."""

    @torch.no_grad()
    def suspect(ids: Tensor, part: int | None = None) -> Tensor:
        B, T = ids.shape
        mask = attention_mask(torch.ones(B, T, dtype=torch.bool))
        if part is None:
            positions = torch.arange(T).expand(B, T)
            x = gemma.embed(ids)
            return gemma.logits(gemma(x, positions=positions, mask=mask)).float()
        c = gemma.config
        cache = KVCache(
            depth=c.depth,
            batch_size=B,
            num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            num_slots=T,
            dtype=gemma.embed_tokens.weight.dtype,
        )
        outputs = []
        for tokens in ids.split(part, dim=1):
            slots = cache.reserve(tokens.shape[1])
            positions = slots.expand(B, len(slots))
            x = gemma.embed(tokens)
            hidden = gemma(x, positions=positions, mask=mask[:, :, slots], cache=cache)
            outputs.append(gemma.logits(hidden))
        return torch.cat(outputs, dim=1).float()

    return suspect


def patients(seed: int, std: float | None = None) -> list[dict[str, Suspect]]:
    """Suspects and candidates: the right model and each bug, with equal weights.

    Suspects compute in float64, so that nothing is equal to the last bit.
    """
    generator = torch.Generator().manual_seed(seed)
    right = Gemma(CONFIG)
    with torch.no_grad():
        for weight in right.parameters():
            spread = 0.3 if weight.ndim == 1 else weight.shape[1] ** -0.5
            weight.normal_(std=std or spread, generator=generator)
    twins = [(twin.__name__, twin) for twin in TWINS]
    both = []
    for dtype in (torch.float64, torch.float32):
        models = [("none", copy.deepcopy(right))]
        models += [(name, with_bug(right, twin)) for name, twin in twins]
        both.append({name: runner(model.to(dtype)) for name, model in models})
    return both


@exercise("10.4")
def every_bug_is_found(find_bug):
    """names every bug, and the model that has none"""
    suspects, candidates = patients(seed=0)
    for name, suspect in suspects.items():
        found = find_bug(suspect, candidates)
        require(found == name, f"the bug was {name}, the answer {found}")


@exercise("10.4")
def bugs_are_found_in_small_weights(find_bug):
    """finds them where the differences are small, in any order of names"""
    suspects, candidates = patients(seed=1, std=0.05)
    backwards = dict(reversed(candidates.items()))
    for name in ("none", "GeluByErf", "ScaleFromWidth", "PositionsFromZero"):
        found = find_bug(suspects[name], backwards)
        require(found == name, f"the bug was {name}, the answer {found}")
