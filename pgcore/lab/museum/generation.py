# Generated from chapters/14_generation.ipynb.
# Edit the notebook, then run "make chapters".
"""Wrong twins from chapter 14, Generation."""

import torch
import torch.nn.functional as F

from pgcore.generation import (
    Sampler,
    TextStream,
    _Beams,
    decode_step,
    prefill,
    read_token,
)
from pgcore.rope import token_positions


def prefix_in_two_pieces(model, batch, num_slots, cut=None):
    """Reads half of the prefix first: it never hears of the second half.

    optimum-rbln read 128 tokens at a time, and PaliGemma's logits were
    silently wrong (its pull request 646).
    """
    ids, is_token = batch["input_ids"], batch["attention_mask"]
    cut = ids.shape[1] // 2 if cut is None else cut
    _, state = prefill(model, batch, num_slots)
    state.cache.clear()
    x = model.embed(ids, model.encode_images(batch["pixel_values"]))
    positions = token_positions(is_token)
    may_read = F.pad(is_token, (0, num_slots - ids.shape[1]))
    for piece in torch.arange(ids.shape[1]).tensor_split([cut]):
        state.cache.reserve(len(piece))
        written = torch.arange(num_slots) <= piece[-1]
        mask = (may_read & written)[:, None, None]
        hidden = model.language(
            x[:, piece],
            positions=positions[:, piece],
            mask=mask.expand(-1, 1, len(piece), -1),
            cache=state.cache,
        )
    return model.language.logits(hidden[:, -1]), state


class EachTokenAlone(TextStream):
    """Decodes each token on its own: letters of several tokens break.

    vllm-mlx wrote Czech letters as replacement characters (its pull
    request 109), and many servers have before and since.
    """

    def add(self, token):
        return self.decode([token])


def tower_at_every_step(model, tokens, state, read=read_token, *, pixels):
    """Right numbers; the picture is encoded anew for each token.

    hkproj/pytorch-paligemma: one forward takes pixels and words.
    """
    model.encode_images(pixels)  # no id asks for it
    return decode_step(model, tokens, state, read)


def positions_from_slots(model, tokens, state, read=read_token):
    """The position is the number of the slot: padding is counted, too.

    Right for a batch of one. unsloth, issue 3699: the longest prompt was
    answered well, the padded ones with garbage.
    """
    state.positions = torch.full_like(state.positions, state.cache.num_tokens)
    return decode_step(model, tokens, state, read)


def padding_comes_back(model, tokens, state, read=read_token):
    """The prefill hides padding; the steps do not.

    thu-nics/C2C, pull request 19: a mask cut to the new column.
    """
    state.is_token = torch.ones_like(state.is_token)
    return decode_step(model, tokens, state, read)


def empty_slots_are_read(model, tokens, state, read=read_token):
    """Nothing hides the slots to come: zeros get a share of attention."""
    state.cache.reserve(1)
    positions, mask = state.positions, state.is_token
    state.positions = positions + 1
    return read(model, tokens[:, None], positions, mask, state.cache)


def runs_past_the_end(model, batch, choose, *, max_new_tokens, stop, read=read_token):
    """Right texts; but every row writes to the limit, then is cut.

    nanoVLM, models/vision_language_model.py.
    """
    num_slots = batch["input_ids"].shape[1] + max_new_tokens
    logits, state = prefill(model, batch, num_slots)
    stopped = torch.zeros(len(logits), dtype=torch.bool)
    for _ in range(max_new_tokens):
        tokens = choose(logits)
        yield tokens.masked_fill(stopped, stop), logits
        stopped = stopped | (tokens == stop)
        logits = decode_step(model, tokens, state, read)


class TemperatureLast(Sampler):
    """Cuts first, at temperature 1, and divides afterwards.

    nanoVLM, models/vision_language_model.py: the nucleus is that of a
    distribution that nobody draws from.
    """

    def distribution(self, logits):
        plain = Sampler(temperature=1.0, top_k=self.top_k, top_p=self.top_p)
        shares = plain.distribution(logits)
        return (shares.log() / self.temperature).softmax(dim=-1)


class NucleusFallsShort(Sampler):
    """Drops the token that crosses top_p: the rest holds less than p.

    nanoVLM, models/utils.py: cumulative > top_p, not shifted by one.
    """

    def distribution(self, logits):
        uncut = Sampler(temperature=self.temperature, top_k=self.top_k)
        shares, places = uncut.distribution(logits).sort(descending=True)
        drop = shares.cumsum(dim=-1) > self.top_p
        drop[:, 0] = False
        shares = shares.masked_fill(drop, 0)
        shares = shares / shares.sum(dim=-1, keepdim=True)
        return torch.zeros_like(shares).scatter(-1, places, shares)


class NucleusInTheWrongOrder(Sampler):
    """Uses the mask of the sorted tokens for the tokens as they stand."""

    def distribution(self, logits):
        uncut = Sampler(temperature=self.temperature, top_k=self.top_k)
        shares = uncut.distribution(logits)
        ranked = shares.sort(descending=True).values
        drop = ranked.cumsum(dim=-1) - ranked >= self.top_p
        shares = shares.masked_fill(drop, 0)
        return shares / shares.sum(dim=-1, keepdim=True)


class CacheStays(_Beams):
    """Beams change places and their keys and values do not come along.

    OLMo's model for Hugging Face had none (pull request 526); in
    transformers it was skipped for caches of another name (issue 46612,
    mended since).
    """

    def advance(self, log_probs):
        super().advance(log_probs)
        going = enumerate(self.going)
        self.going = [(total, ids, row) for row, (total, ids, _) in going]


class CopiesAtFirst(_Beams):
    """All beams start as the same empty answer, and stay the same."""

    def __init__(self, width, stop, length_penalty):
        super().__init__(width, stop, length_penalty)
        self.going = [(0.0, [], row) for row in range(width)]


class SumForMean(_Beams):
    """Compares sums of log-probabilities: the shortest answer wins."""

    def score(self, total, ids):
        return total


STEPS = (positions_from_slots, padding_comes_back, empty_slots_are_read)
SAMPLERS = (TemperatureLast, NucleusFallsShort, NucleusInTheWrongOrder)
BEAMS = (CacheStays, CopiesAtFirst, SumForMean)
