"""What PaliGemma is asked about a scene, and the right answers.

Prompts are PaliGemma's own, without the newline that ends them there. Boxes are
written as four tokens ``<loc0000>`` to ``<loc1023>``, in the order top, left, bottom,
right, in 1023rds of the picture's side (PaliGemma, section 3.2.5).

Axes: R pixels a side.
"""

from collections.abc import Sequence

from pgcore.lab import _scene_questions as questions
from pgcore.lab._draws import Draws
from pgcore.lab._near import unknown
from pgcore.lab._scene_questions import (
    MASK_CODES,
    MASK_TOKENS,
    Draft,
    EncodeMask,
    Example,
)
from pgcore.lab._scene_text import (
    CAPTION_LANGUAGES,
    MASK_SIDE,
    box_mask,
    caption,
    loc_tokens,
    require_things,
)
from pgcore.lab.scenes import Scene

__all__ = [
    "CAPTION_LANGUAGES",
    "KINDS",
    "MASK_CODES",
    "MASK_SIDE",
    "MASK_TOKENS",
    "EncodeMask",
    "Example",
    "all_examples",
    "box_mask",
    "caption",
    "choose_examples",
    "loc_tokens",
]

KINDS = ("caption", "count", "presence", "relation", "detect", "segment", "region")


def all_examples(
    scene: Scene,
    kinds: Sequence[str] = KINDS,
    *,
    languages: Sequence[str] = CAPTION_LANGUAGES,
    encode_mask: EncodeMask | None = None,
    seed: int = 0,
) -> tuple[Example, ...]:
    """Ask everything about a scene, kind after kind.

    Args:
        kinds: names of KINDS.
        languages: of captions; all else is in English.
        encode_mask: turns a mask [64, 64] in [0, 1] into 16 codes 0..127.
        seed: of the absent concepts that are asked for, and of the order of names.

    Raises:
        ValueError: for an unknown kind or language, for codes that are not such, and
            for a scene without objects.
    """
    drafts = _drafts(scene, kinds, languages, encode_mask, _draws(scene, seed))
    return tuple(draft() for kind in kinds for draft in drafts[kind])


def choose_examples(
    scene: Scene,
    number: int,
    kinds: Sequence[str] = KINDS,
    *,
    languages: Sequence[str] = CAPTION_LANGUAGES,
    encode_mask: EncodeMask | None = None,
    seed: int = 0,
) -> tuple[Example, ...]:
    """Ask `number` things about a scene, none twice; fewer if there are no more.

    Each time a kind is drawn among those that have something left to ask, then one of
    its questions; a kind that is named twice is drawn twice as often. The other
    arguments are those of ``all_examples``.

    Raises:
        ValueError: for an unknown kind or language, for codes that are not such, and
            for a scene without objects.
    """
    draws = _draws(scene, seed)
    drafts = _drafts(scene, kinds, languages, encode_mask, draws)
    chosen = []
    while len(chosen) < number and (left := [kind for kind in kinds if drafts[kind]]):
        questions = drafts[draws.pick(left)]
        chosen.append(questions.pop(draws.below(len(questions)))())
    return tuple(chosen)


def _draws(scene: Scene, seed: int) -> Draws:
    """Open a stream that the scene itself did not use."""
    return Draws(scene.seed, scene.index, 1, seed)


def _drafts(
    scene: Scene,
    kinds: Sequence[str],
    languages: Sequence[str],
    encode_mask: EncodeMask | None,
    draws: Draws,
) -> dict[str, list[Draft]]:
    """Prepare the questions of all kinds, so that asking fewer shifts no draw."""
    require_things(scene)
    for kind in kinds:
        if kind not in KINDS:
            raise unknown("kind", kind, KINDS)
    for language in languages:
        if language not in CAPTION_LANGUAGES:
            raise unknown("caption language", language, CAPTION_LANGUAGES)
    absent = questions.absent_concepts(scene, draws)
    return {
        "caption": questions.captions(scene, languages),
        "count": questions.counts(scene, absent),
        "presence": questions.presences(scene, absent),
        "relation": questions.relations(scene),
        "detect": questions.detections(scene, absent, draws),
        "segment": questions.segmentations(scene, encode_mask),
        "region": questions.regions(scene),
    }
