"""``pgcore.load`` and ``pgcore.generate``: all chapters behind two functions."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgcore.files import one_line, shown
from pgcore.generation import (
    Sampler,
    TextStream,
    beam_search,
    compiled_read_token,
    read_token,
    write_tokens,
)
from pgcore.paligemma import PaliGemma, PaliGemmaConfig
from pgcore.processing import EOS, Processor, load_processor
from pgcore.weights import load_weights, read_checkpoint

TINY = Path(__file__).parent / "assets" / "tiny"
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model"]  # nothing else comes


def load(
    source: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
) -> tuple[PaliGemma, Processor]:
    """Load a PaliGemma and its processor, ready for use.

    Args:
        source: ``"tiny"``, which ships with the book; a folder; or a name on the
            Hugging Face hub such as ``"google/paligemma2-3b-mix-224"``, whose files are
            downloaded once. The token is found where ``hf auth login`` puts it.
        device: as torch names it; ``"auto"`` takes a GPU if there is one.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or a torch dtype;
            ``"auto"`` takes the files' own, but float32 for float16 on a CPU, which
            multiplies that slowly.

    Raises:
        FileNotFoundError: if the source, or one of its files, is not there.
        ValueError: for anything in it that is broken or does not fit.
    """
    wanted, chosen = choose_dtype(dtype), choose_device(device)
    folder = find_checkpoint(source)
    checkpoint = read_checkpoint(folder)
    processor = load_processor(folder)
    require_fit(checkpoint.config, processor, folder)
    if dtype == "auto" and chosen == "cpu":
        kinds = {tensor.dtype for tensor in checkpoint.tensors.values()}
        wanted = torch.float32 if kinds == {torch.float16} else None
    return load_weights(checkpoint, device=chosen, dtype=wanted), processor


def choose_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The torch dtype of a name; None for ``"auto"``.

    Raises:
        ValueError: for any other name, and for a dtype that no model can have.
    """
    if isinstance(dtype, str) and dtype == "auto":
        return None
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in (*DTYPES.values(), torch.float64):
        names = ", ".join(DTYPES)
        raise ValueError(f"dtype: expected auto, {names}, found {shown(dtype)}")
    return found


def choose_device(device: str | torch.device) -> str:
    """Turn ``"auto"`` into a GPU if there is one; check any other name.

    Raises:
        ValueError: for a device that torch does not know or that is not there.
    """
    if device == "auto":
        there = torch.accelerator.is_available()  # torch may be built for one only
        found = torch.accelerator.current_accelerator() if there else None
        return found.type if found is not None else "cpu"
    try:
        found = torch.device(device)
        torch.empty(1, device=found).item()  # on "meta" there are no numbers
    except Exception as error:  # each kind of device fails in its own way
        why = _first_line(error)
        raise ValueError(f"device: {shown(device)} cannot be used: {why}") from None
    return "cpu" if found.type == "cpu" else str(found)


def find_checkpoint(source: str | Path) -> Path:
    """The folder of a checkpoint; one on the hub is downloaded first.

    Raises:
        FileNotFoundError: if it is neither here nor there.
        ValueError: if the hub refuses it.
    """
    name = str(source)
    if name == "tiny":
        return TINY
    if os.path.isdir(name):
        return Path(name)
    if os.path.lexists(name) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise FileNotFoundError(
            f"{one_line(name)}: expected a folder, a name on the hub such as"
            ' google/paligemma2-3b-mix-224, or "tiny"'
        )
    return _download(name)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except GatedRepoError:
        raise ValueError(
            f"{name}: its licence must be accepted first: do so on its page on the hub,"
            " then log in with: hf auth login"
        ) from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{name}: neither a folder nor a model that the hub shows you; check the"
            " name, and log in with: hf auth login"
        ) from None
    except Exception as error:  # of the network, the disk, the hub
        raise FileNotFoundError(
            f"{one_line(name)}: not a folder, and it cannot be downloaded:"
            f" {_first_line(error)}"
        ) from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return one_line(lines[0])


def require_fit(config: PaliGemmaConfig, processor: Processor, where: Path) -> None:
    """Raise ValueError unless the processor makes what such a model reads."""
    vision, rows = config.vision, config.text.vocab_size
    image_token = processor.id_of("<image>")
    for name, found, expected in (
        ("image size", processor.image_size, vision.image_size),
        ("image tokens", processor.num_image_tokens, vision.num_patches),
        ("id of <image>", image_token, config.image_token),
    ):
        if found != expected:
            raise ValueError(
                f"{where}: {name}: the processor has {found}, the model {expected}"
            )
    ids = processor.tokenizer.get_vocab().values()  # numbers may be left out
    most = max(token for token in ids if token != image_token)
    if most >= rows:
        raise ValueError(
            f"{where}: the tokenizer has ids up to {most}, the model {rows} words"
        )


@dataclass(frozen=True)
class Answer:
    """What the model wrote for one prompt.

    Attributes:
        text: without ``<eos>``.
        tokens: the ids, with ``<eos>`` if the answer ended with it.
        probabilities: the model's own, one a token; their product is that of the
            answer. Empty after a beam search.
    """

    text: str
    tokens: list[int]
    probabilities: list[float]

    def __str__(self) -> str:
        return self.text


def generate(
    model: PaliGemma,
    processor: Processor,
    images: Any,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    seed: int | None = None,
    stream: bool = False,
    probabilities: bool = False,
    compile: bool = False,
) -> Any:
    """Answer prompts about pictures.

    Args:
        model: from ``load``.
        processor: from ``load``.
        images: a picture for each prompt; or a list of several, or of none.
        prompts: in PaliGemma's language, such as ``"caption en"``. One prompt and one
            picture may stand alone: then the result stands alone, too.
        max_new_tokens: an answer is cut there.
        temperature: 0 always writes the most probable token; above it, draws.
        top_k: draw from the so many most probable tokens. Needs a temperature.
        top_p: draw from the fewest tokens that hold this share. Needs one, too.
        num_beams: above 1, search for the most probable answer, so many at a time.
        length_penalty: of that search; above 1 favours long answers.
        seed: the same seed draws the same answers.
        stream: return an iterator at once that gives the text as it is written: for
            each token a piece a prompt, often one word, at times ``""``.
        probabilities: return an ``Answer`` for each prompt, not only its text.
        compile: compile the decode step. The first use takes half a minute and more.

    Returns:
        A text for each prompt; or what ``stream`` or ``probabilities`` ask for.

    Raises:
        ValueError: for options that exclude each other or make no sense, and as the
            processor.
    """
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected 1 or more, found {max_new_tokens}")
    if num_beams > 1 and (stream or probabilities or compile or temperature > 0):
        raise ValueError(
            "num_beams: a search goes with none of stream, probabilities, compile and"
            " temperature"
        )
    device = model.projector.linear.weight.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    sampler = Sampler(
        temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
    )
    if temperature == 0 and (top_k is not None or top_p != 1):
        raise ValueError("top_k, top_p: they need a temperature above 0")
    alone = isinstance(prompts, str)
    batch = processor([images], [prompts]) if alone else processor(images, prompts)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    limits = {"max_new_tokens": max_new_tokens, "stop": processor.id_of(EOS)}
    if num_beams != 1:
        search = {"num_beams": num_beams, "length_penalty": length_penalty}
        found = beam_search(model, batch, **search, **limits)
        texts = [processor.decode(ids) for _, ids in found]
        return texts[0] if alone else texts
    read = compiled_read_token() if compile else read_token
    written = write_tokens(model, batch, sampler, read=read, **limits)
    if stream:
        pieces = _pieces(written, processor, len(batch["input_ids"]))
        return (row[0] for row in pieces) if alone else pieces
    answers = _answers(written, processor, probabilities)
    results = answers if probabilities else [answer.text for answer in answers]
    return results[0] if alone else results


Written = Iterator[tuple[Tensor, Tensor]]


def _pieces(written: Written, processor: Processor, rows: int) -> Iterator[list[str]]:
    stop = processor.id_of(EOS)
    streams = [TextStream(processor.tokenizer.decode) for _ in range(rows)]
    for tokens, _ in written:
        yield [
            "" if token == stop else stream.add(token)
            for stream, token in zip(streams, tokens.tolist(), strict=True)
        ]
    if any(rest := [stream.end() for stream in streams]):
        yield rest


def _answers(written: Written, processor: Processor, chances: bool) -> list[Answer]:
    columns, shares = [], []
    for tokens, logits in written:
        columns.append(tokens)
        if chances:
            share = logits.float().softmax(dim=-1)
            shares.append(share.gather(-1, tokens[:, None])[:, 0])
    stop = processor.id_of(EOS)
    answers = []
    for number, row in enumerate(torch.stack(columns, dim=1).tolist()):
        tokens = row[: row.index(stop) + 1] if stop in row else row
        own = [float(share[number]) for share in shares[: len(tokens)]]
        answers.append(Answer(processor.decode(tokens), tokens, own))
    return answers
