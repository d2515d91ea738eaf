# Generated from chapters/14_generation.ipynb.
# Edit the notebook, then run "make chapters".
"""Generation: read the prefix at once, then write token after token.

Prefill fills the cache with pictures and prompts; a decode step reads
one token a row. What to write next follows from the logits alone: the
most probable token, a drawn one, or the best of several answers.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pgcore.kv_cache import KVCache
from pgcore.paligemma import PaliGemma, prefix_lm_mask
from pgcore.rope import token_positions


@dataclass
class Decoding:
    """Where a generation stands between two steps.

    Built in chapter 14, Generation.
    """

    cache: KVCache  # keys and values of all tokens so far
    is_token: Bool[Tensor, "B 1 1 S"]  # False is padding; to come: True
    positions: Int[Tensor, "B 1"]  # of each row's next token


def prefill(
    model: PaliGemma, batch: Mapping[str, Tensor], num_slots: int
) -> tuple[Float[Tensor, "B V"], Decoding]:
    """Read pictures and prompts in one piece; logits of the next token.

    batch: of ``Processor``, without suffixes. num_slots: S, for the
    prefix and all tokens to come. In two pieces the prefix could not be
    read: its tokens read each other in both directions. Call it under
    torch.no_grad or inference_mode, and the steps under the same.
    Raises ValueError if the prefix is longer than num_slots.
    Source: Beyer et al. (2024), section 3.1.

    Built in chapter 14, Generation.
    """
    ids, is_token = batch["input_ids"], batch["attention_mask"]
    B, T = ids.shape
    if num_slots < T:
        raise ValueError(f"num_slots: expected at least {T}, found {num_slots}")
    images = model.encode_images(batch["pixel_values"])
    x, text = model.embed(ids, images), model.config.text
    heads = {"num_kv_heads": text.num_kv_heads, "head_dim": text.head_dim}
    sizes = {"depth": text.depth, "batch_size": B, "num_slots": T}
    cache = KVCache(**sizes, **heads, dtype=x.dtype, device=x.device)
    cache.reserve(T)
    positions = token_positions(is_token)
    mask = prefix_lm_mask(is_token, is_token & False)
    hidden = model.language(
        x, positions=positions, mask=mask, cache=cache, last_only=True
    )
    room = 0, num_slots - T  # made now: the prefix need not look at it
    cache = cache.changed(lambda kept: F.pad(kept, (0, 0, *room)))
    is_token = F.pad(is_token, room, value=True)
    state = Decoding(cache, is_token[:, None, None], positions[:, -1:] + 1)
    return model.language.logits(hidden[:, -1]), state


def read_token(
    model: PaliGemma,
    tokens: Int[Tensor, "B 1"],
    positions: Int[Tensor, "B 1"],
    mask: Bool[Tensor, "B 1 1 S"],
    cache: KVCache,
) -> Float[Tensor, "B V"]:
    """One token a row in, logits of the next out.

    The part of a step that can be compiled: shapes stay, no number grows.

    Built in chapter 14, Generation.
    """
    x = model.language.embed(tokens)
    hidden = model.language(x, positions=positions, mask=mask, cache=cache)
    return model.language.logits(hidden[:, -1])


def decode_step(
    model: PaliGemma,
    tokens: Int[Tensor, " B"],
    state: Decoding,
    read: Callable[..., Tensor] = read_token,
) -> Float[Tensor, "B V"]:
    """Read the token just written to each row; logits of the next.

    ``state`` moves on. read: ``read_token``, or what
    ``compiled_read_token`` gives. Raises ValueError when no slot is left.

    Built in chapter 14, Generation.
    """
    slot = state.cache.reserve(1)
    slots = torch.arange(state.is_token.shape[-1], device=slot.device)
    mask = state.is_token & (slots <= slot)
    positions, state.positions = state.positions, state.positions + 1
    return read(model, tokens[:, None], positions, mask, state.cache)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Logits in, the next token of each row out.

    First the temperature. Then only the top_k most probable stay, and
    of these only the fewest that hold a share of top_p, one at least.
    Temperature 0, the default, takes the most probable token.
    Raises ValueError unless temperature is 0 or more, top_k at least 1,
    top_p above 0 and at most 1.
    Source: Holtzman et al. (2020), section 3.1.

    Built in chapter 14, Generation.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    generator: torch.Generator | None = None  # None: torch's own

    def __post_init__(self):
        t, k, p = knobs = self.temperature, self.top_k, self.top_p
        if not (0 <= t < math.inf and 0 < p <= 1 and (k is None or k >= 1)):
            raise ValueError(
                "temperature, top_k, top_p: expected 0 or more, 1 or more "
                f"(or None), and above 0 to 1, found {knobs}"
            )

    def distribution(self, logits: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """What the token is drawn from, in float32."""
        if self.temperature == 0:
            return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
        # The largest becomes 0 first: dividing cannot overflow upwards.
        scores = logits.float() - logits.float().amax(-1, keepdim=True)
        scores, places = (scores / self.temperature).sort(descending=True, stable=True)
        scores[:, self.top_k or scores.shape[-1] :] = -torch.inf
        shares = scores.softmax(dim=-1)
        if self.top_p < 1:  # drop what more probable ones do not leave
            before = F.pad(shares.cumsum(dim=-1), (1, -1))
            shares = shares.masked_fill(before >= self.top_p, 0)
            shares = shares / shares.sum(dim=-1, keepdim=True)
        return torch.zeros_like(shares).scatter(-1, places, shares)

    def __call__(self, logits: Float[Tensor, "B V"]) -> Int[Tensor, " B"]:
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        shares = self.distribution(logits)
        return torch.multinomial(shares, 1, generator=self.generator)[:, 0]


def write_tokens(
    model: PaliGemma,
    batch: Mapping[str, Tensor],
    choose: Callable[[Float[Tensor, "B V"]], Int[Tensor, " B"]],
    *,
    max_new_tokens: int,
    stop: int,
    read: Callable[..., Tensor] = read_token,
) -> Iterator[tuple[Int[Tensor, " B"], Float[Tensor, "B V"]]]:
    """Yield each row's next token and the logits it was chosen from.

    choose: from logits to tokens. A row that wrote ``stop`` goes on
    writing it, and all end when every row has.

    Built in chapter 14, Generation.
    """
    num_slots = batch["input_ids"].shape[1] + max_new_tokens
    # Another number of slots may compile anew: let there be few.
    num_slots += 0 if read is read_token else -num_slots % 128
    with torch.inference_mode():  # not around yield: it would leak out
        logits, state = prefill(model, batch, num_slots)
    stopped = torch.zeros_like(logits[:, 0], dtype=torch.bool)
    for left in reversed(range(max_new_tokens)):
        tokens = choose(logits).masked_fill(stopped, stop)
        yield tokens, logits
        stopped = stopped | (tokens == stop)
        if stopped.all() or not left:
            return
        with torch.inference_mode():
            logits = decode_step(model, tokens, state, read)


class _Beams:
    """The answers of one row: those being written, and those that ended."""

    def __init__(self, width: int, stop: int, length_penalty: float):
        self.width, self.stop, self.penalty = width, stop, length_penalty
        # Sums, ids, and which beam each was before; at first there is one.
        self.going: list[tuple[float, list[int], int]] = [(0.0, [], 0)]
        self.ended: list[tuple[float, list[int]]] = []  # scores, ids

    def advance(self, log_probs: Float[Tensor, "beams V"]) -> None:
        """Lengthen the beams; looks at twice the width, as some end."""
        sums = log_probs.new_tensor([total for total, *_ in self.going])
        totals = log_probs[: len(sums)] + sums[:, None]
        best = totals.flatten().topk(min(2 * self.width, totals.numel()))
        before, self.going = self.going, []
        ranked = zip(*map(Tensor.tolist, best), strict=True)
        for rank, (total, place) in enumerate(ranked):
            parent, token = divmod(place, log_probs.shape[-1])
            ids = [*before[parent][1], token]
            if token != self.stop and len(self.going) < self.width:
                self.going.append((total, ids, parent))
            elif token == self.stop and rank < self.width:
                self.ended.append((self.score(total, ids), ids))
        self.ended = sorted(self.ended, reverse=True)[: self.width]

    def score(self, total: float, ids: list[int]) -> float:
        return total / len(ids) ** self.penalty

    def is_done(self) -> bool:
        """True if what goes on cannot beat what ended, at this length."""
        beaten = (self.score(t, ids) <= self.ended[-1][0] for t, ids, _ in self.going)
        return len(self.ended) >= self.width and all(beaten)

    def best(self) -> tuple[float, list[int]]:
        return max(self.ended + [(self.score(t, ids), ids) for t, ids, _ in self.going])


@torch.inference_mode()
def beam_search(
    model: PaliGemma,
    batch: Mapping[str, Tensor],
    *,
    num_beams: int,
    max_new_tokens: int,
    stop: int,
    length_penalty: float = 1.0,
) -> list[tuple[float, list[int]]]:
    """Each row's best answer, of num_beams at a time, behind its score.

    Score: the sum of the tokens' log-probabilities, ``stop`` included, by
    length ** length_penalty. Pictures and prompts are read once.
    Raises ValueError for num_beams below 1.
    Source: Beyer et al. (2024), appendix J; the rules of Hugging Face.

    Built in chapter 14, Generation.
    """
    if type(num_beams) is not int or num_beams < 1:
        raise ValueError(f"num_beams: expected at least 1, found {num_beams}")
    B, T = batch["input_ids"].shape
    logits, state = prefill(model, batch, T + max_new_tokens)
    rows = [_Beams(num_beams, stop, length_penalty) for _ in range(B)]
    copies = torch.arange(B * num_beams, device=logits.device) // num_beams
    logits, state = logits[copies], _select(state, copies)
    for left in reversed(range(max_new_tokens)):
        table = logits.float().log_softmax(dim=-1).split(num_beams)
        order, tokens = [], []
        for row, log_probs in zip(rows, table, strict=True):
            if not row.is_done():
                row.advance(log_probs)
            idle = num_beams - len(row.going)  # what they read, nobody uses
            places = [was for *_, was in row.going] + [0] * idle
            order += [len(order) + place for place in places]
            tokens += [ids[-1] for _, ids, _ in row.going] + [stop] * idle
        if not left or all(row.is_done() for row in rows):
            break
        order, tokens = torch.tensor([order, tokens], device=logits.device)
        logits = decode_step(model, tokens, state := _select(state, order))
    return [row.best() for row in rows]


def _select(state: Decoding, rows: Int[Tensor, " rows"]) -> Decoding:
    """A state whose row i is what row rows[i] was."""
    cache = state.cache.changed(lambda kept: kept[:, rows])
    return Decoding(cache, state.is_token[rows], state.positions[rows])


class TextStream:
    """Ids of one row in, pieces of text out.

    A letter of several bytes may be several tokens: it comes out when it
    is whole, or with ``end``.

    Built in chapter 14, Generation.
    """

    def __init__(self, decode: Callable[[list[int]], str]):
        self.decode, self.ids, self.text = decode, [], ""

    def add(self, token: int) -> str:
        """The text that this token completes, often one word."""
        self.ids.append(token)
        text = self.decode(self.ids)
        return "" if text.endswith("\ufffd") else self.end()

    def end(self) -> str:
        """What was held back."""
        before, self.text = self.text, self.decode(self.ids)
        return self.text[len(before) :]


@cache
def compiled_read_token() -> Callable[..., Tensor]:
    """``read_token`` through torch.compile, in one graph.

    The first call takes half a minute and more. Another batch size,
    number of slots or configuration takes it again, until torch lets that
    size vary. After many configurations in one process torch refuses:
    then call torch.compiler.reset().

    Built in chapter 14, Generation.
    """
    return torch.compile(read_token, fullgraph=True, backend=_matrix_vector)


def _matrix_vector(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]):
    """Inductor, with maps of one vector on a CPU written as sums.

    oneDNN reads the weights of such a map at half the memory's speed.
    """
    for node in graph.graph.find_nodes(op="call_function", target=F.linear):
        x, weight, *bias = (n.meta["example_value"] for n in node.all_input_nodes)
        if x.device.type == "cpu" and x.numel() == x.shape[-1] and not bias:
            node.target = _map_of_one
    graph.recompile()
    return torch._inductor.compile(graph, list(inputs))


def _map_of_one(x: Tensor, weight: Tensor, bias: None = None) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    products = weight.to(wide) * x.reshape(-1).to(wide)  # never stored
    return products.sum(dim=-1).to(x.dtype).view(*x.shape[:-1], -1)


__all__ = [
    "Decoding",
    "Sampler",
    "TextStream",
    "beam_search",
    "compiled_read_token",
    "decode_step",
    "prefill",
    "read_token",
    "write_tokens",
]
