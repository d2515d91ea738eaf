"""The text of the gallery: a template, and figures that it counts itself."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pgcore.grounding import box_iou, parse
from pgcore.lab.scoring import named_in, share_box

TITLES = {"test-scenes": "known artists", "test-artist": "a new artist"}
ASKED = {
    "caption": ("Captions", "a caption in English"),
    "count": ("Counts", "how many there are of a thing"),
    "presence": ("Yes or no", "whether there is such a thing"),
    "relation": ("Left, right, above, below", "what lies left, right, above or below"),
    "detect": ("Boxes", "a box around each thing of a name"),
    "segment": ("Masks", "a box and sixteen codes of an outline for each thing"),
}
HEAD = """\
# Good and bad answers

What the small model of this book does best, and what it does worst. Nobody chose the
pictures. There are {scenes} new scenes with drawings by the artists of the training,
and as many by an artist that it never saw. The recipe
`pgcore.recipes.gallery` takes the answers with the lowest and the highest **loss**: the
mean negative log-probability, in nats, that the model gives to the tokens of the
*right* answer. 0 is certainty, 0.7 an even chance for each token.

The worst of {scenes} is not what to expect.
[The whole machine](../chapters/00_the_whole_machine.ipynb) says how good the model is
on average, with intervals.

In each sheet the first row shows the three best of all, the second row the three worst
of known artists, the third row the three worst of the new one; at most one of a scene.
"""
FOOT = """\
## Made from

The weights:

```text
model.safetensors
SHA-256 {digest}
```

Written by `python -m pgcore.recipes.gallery --out book`; another model gives another
page.
"""


def page(
    judged: Mapping[str, Sequence[Any]],
    chosen: Mapping[str, Sequence[Any]],
    looked: Mapping[str, Any],
    digest: str,
    scenes: int,
) -> str:
    """All of it: for each kind a sheet and a table, attention, what goes wrong most."""
    parts = [HEAD.format(scenes=scenes)]
    parts += [section(kind, judged[kind], chosen[kind]) for kind in judged]
    parts += [attention(looked), mistakes(judged), FOOT.format(digest=digest)]
    return "\n".join(parts)


def section(kind: str, judged: Sequence[Any], chosen: Sequence[Any]) -> str:
    """One kind of question."""
    title, what = ASKED[kind]
    boxes = kind in ("detect", "segment")
    lines = [f"## {title}\n", f"Asked is {what}. {right_shares(judged, boxes)}"]
    worst = chosen[3:]
    wrong = sum(not one.is_right for one in worst)
    sheet = f"{{numref}}`fig-gallery-{kind}`"
    if wrong == len(worst):
        lines.append(f"All {wrong} with the highest loss are wrong ({sheet}).")
    else:
        why = (
            "The loss asks for exactly these place tokens: a box that is a little off"
            " has a high loss, and may share enough to be right."
            if boxes
            else "The model was unsure; the right token may still have been the"
            " likeliest."
        )
        lines.append(
            f"Of the {len(worst)} with the highest loss, {wrong} are wrong ({sheet})."
            f" {why}"
        )
    drawn = " Green: the right boxes; orange: what the model answered." if boxes else ""
    named = "; ".join(
        f"{number}: {', '.join(o.concept for o in one.scene.objects)}"
        for number, one in enumerate(chosen, start=1)
    )
    lines += [
        "",
        f"```{{figure}} figures/gallery_{kind}.png",
        f":name: fig-gallery-{kind}",
        f":alt: {len(chosen)} small scenes in rows of three. {named}.",
        "",
        f"{title}: three best, then six worst. The table below has the words.{drawn}",
        "```",
        "",
        table(chosen, boxes),
    ]
    return "\n".join(lines) + "\n"


def right_shares(judged: Sequence[Any], boxes: bool) -> str:
    """How many are right, of each split."""
    shares = []
    for name, title in TITLES.items():
        own = [one for one in judged if one.split == name]
        if own:
            share = 100 * sum(one.is_right for one in own) / len(own)
            shares.append(f"{share:.0f} % of {len(own):,} ({title})")
    how = "IoU of one half or more" if boxes else "word for word"
    return f"Right ({how}): {' and '.join(shares)}."


def table(chosen: Sequence[Any], boxes: bool) -> str:
    """Prompts, right answers, the model's, losses."""
    lines = [
        f"| | prompt | right answer | the model | loss |{' IoU |' if boxes else ''}",
        f"|---|---|---|---|---:|{'---:|' if boxes else ''}",
    ]
    for number, one in enumerate(chosen, start=1):
        example = one.asked.example
        cells = [str(number), example.prompt, short(example.answer)]
        same = one.asked.answer == example.answer
        said = "the same" if same else short(one.asked.answer)
        cells += [said, f"{one.loss:.2f}"]
        cells += [f"{one.iou:.2f}"] if boxes else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def short(text: str) -> str:
    """An answer for a table: places as numbers, a mask as a word."""
    text = re.sub("(<seg[0-9]{3}>)+", "+ mask ", text)
    text = re.sub("<loc([0-9]{4})>", lambda found: f"{int(found[1])} ", text)
    text = " ".join(text.split())
    text = re.sub("[^\\w ;,.?'’+×-]", "?", text)  # nothing that the page would obey
    return text if len(text) <= 90 else text[:87] + "..."


def attention(looked: Mapping[str, Any]) -> str:
    """Where the model read when it wrote its best and its worst caption."""
    lines = [
        "## Where it read\n",
        "The attention of the written tokens, at most the first seven, on the 64"
        " patches of the picture: the mean over all layers and heads, each map"
        " brightest where most was read. It shows what was read, not why a word was"
        " written.",
    ]
    for name, one in looked.items():
        example = one.asked.example
        lines += [
            "",
            f"```{{figure}} figures/gallery_attention_{name}.png",
            f":name: fig-gallery-attention-{name}",
            ":alt: The picture, and a map for each of at most seven tokens of"
            f" {short(one.asked.answer)}.",
            "",
            f"The caption with the {'lowest' if name == 'best' else 'highest'} loss,"
            f" {one.loss:.2f}. Right: “{short(example.answer)}”. Written:"
            f" “{short(one.asked.answer)}”.",
            "```",
        ]
    words = (
        "{numref}`fig-gallery-attention-best` and {numref}`fig-gallery-attention-worst`"
    )
    lines += ["", f"Compare {words}: is what was named bright when it was named?"]
    return "\n".join(lines) + "\n"


def mistakes(judged: Mapping[str, Sequence[Any]]) -> str:
    """What goes wrong most, counted."""
    confused, missed, invented, broken = in_captions(judged.get("caption", ()))
    counts = Counter(
        f"{one.asked.example.answer} → {short(one.asked.answer)}"
        for one in judged.get("count", ())
        if not one.is_right
    )
    captions = judged.get("caption", ())
    objects = Counter(
        name
        for one in captions
        for name in {thing.concept for thing in one.scene.objects}
    )
    parts = [
        "## What goes wrong most\n",
        f"Captions that are no list of known things: {broken} of {len(captions)}. Where"
        " one thing is missing from a caption and one is made up, they count as"
        " confused; all others as missing, or as made up.",
        "",
        "| mistake | the most frequent, with how often |",
        "|---|---|",
        f"| confused, right → written | {most(confused)} |",
        f"| not named, of the scenes that show it | {most(missed, objects)} |",
        f"| named, and not there | {most(invented)} |",
        f"| wrong counts, right → written | {most(counts)} |",
        f"| boxes | {boxes_off(judged.get('detect', ()))} |",
    ]
    return "\n".join(parts) + "\n"


def in_captions(judged: Sequence[Any]) -> tuple[Counter, Counter, Counter, int]:
    """Confused pairs, what was missed, what was invented; captions not understood."""
    confused, missed, invented = Counter(), Counter(), Counter()
    broken = 0
    for one in judged:
        named = named_in(one.asked.answer, one.scene.settings.concepts)
        if named is None:
            broken += 1
            continue
        there = {thing.concept for thing in one.scene.objects}
        lost, new = sorted(there - named), sorted(named - there)
        if len(lost) == len(new) == 1:
            confused[f"{lost[0]} → {new[0]}"] += 1
        else:
            missed.update(lost)
            invented.update(new)
    return confused, missed, invented, broken


def most(counts: Counter, of: Counter | None = None, number: int = 6) -> str:
    """The most frequent, in words; ties in the order of the alphabet."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:number]
    if not ranked:
        return "none"
    out_of = {name: f" of {of[name]}" if of else "" for name, _ in ranked}
    rest = sum(counts.values()) - sum(count for _, count in ranked)
    text = ", ".join(f"{name} ({count}{out_of[name]})" for name, count in ranked)
    return f"{text}; {rest} more cases" if rest else text


def boxes_off(judged: Sequence[Any]) -> str:
    """How far the edges of found boxes are off, in pixels, and how many boxes miss."""
    edges, missing, total = [], 0, 0
    for one in judged:
        size = one.scene.settings.size
        boxes = [
            thing.box for thing in parse(one.asked.answer) if thing.box is not None
        ]
        for thing in one.asked.example.objects:
            truth, total = share_box(thing, one.scene), total + 1
            best = max(boxes, key=lambda box: box_iou(box, truth), default=None)
            if best is None or box_iou(best, truth) < 0.1:
                missing += 1
                continue
            gaps = np.abs(np.subtract(best, truth)) * size
            edges += gaps.tolist()
    if not edges:
        return f"none of {total} was found"
    middle, far = np.quantile(edges, (0.5, 0.9))
    return (
        f"{missing} of {total} right boxes have no answer that overlaps by a tenth; the"
        f" edges of the others are off by {middle:.1f} pixels (median), one in ten by"
        f" more than {far:.1f}"
    )
