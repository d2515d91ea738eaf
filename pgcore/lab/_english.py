"""English around the names of emoji: articles, plurals and numbers."""

NUMBERS = (
    *("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen"),
)

# Names that take no article: several are counted by another word.
_COUNTED_BY = {
    "pairs": (
        *("glasses", "sunglasses", "jeans", "skis", "scissors"),
        *("crossed swords", "clinking glasses"),
    ),
    "bunches": ("grapes", "cherries"),
    "sets": (
        *("paw prints", "peanuts", "pancakes", "french fries", "houses"),
        *("hot springs", "fireworks", "sparkles", "Japanese dolls"),
        *("admission tickets", "shopping bags", "prayer beads", "musical notes"),
        *("control knobs", "film frames", "books", "bookmark tabs"),
        *("linked paperclips", "chains", "woman's clothes"),
    ),
    "portions": (
        *(
            "bread",
            "baguette bread",
            "bacon",
            "popcorn",
            "cooked rice",
            "curry rice",
            "spaghetti",
        ),
        *("oden", "sushi", "dango", "shaved ice", "custard", "sake"),
    ),
    "pictures": (
        *("cooking", "camping", "building construction", "construction"),
        *("mount fuji", "Tokyo tower", "kaaba", "milky way", "foggy", "fog"),
        *("high voltage", "tennis", "bowling", "field hockey", "ice hockey"),
        *("ping pong", "badminton", "performing arts", "locked", "unlocked"),
        *("light rail",),
    ),
}
_COUNTERS = {name: word for word, names in _COUNTED_BY.items() for name in names}

# The last word of a name decides, but for these.
_IRREGULAR = {
    "hourglass done": "hourglasses done",
    "chart increasing": "charts increasing",
    "chart decreasing": "charts decreasing",
    "game die": "game dice",
    "snowman": "snowmen",
    "mouse": "mice",
    "ox": "oxen",
    "wolf": "wolves",
    "leaf": "leaves",
    "knife": "knives",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "volcano": "volcanoes",
    "tornado": "tornadoes",
    "buffalo": "buffaloes",
    **{word: word for word in ("deer", "fish", "blowfish", "squid", "shrimp")},
    **{word: word for word in ("fruit", "moai")},
}
_SPOKEN_WITH_A_CONSONANT = ("unicorn", "ewe")
_SPOKEN_WITH_A_VOWEL = ("hourglass",)


def one(name: str) -> str:
    """Name one thing: "a cat", "an ox", "grapes"."""
    if name in _COUNTERS:
        return name
    vowel = name[0].lower() in "aeiou" or name.startswith(_SPOKEN_WITH_A_VOWEL)
    if name.startswith(_SPOKEN_WITH_A_CONSONANT):
        vowel = False
    return f"{'an' if vowel else 'a'} {name}"


def the(name: str) -> str:
    """Name a thing that both know of: "the cat", "mount fuji"."""
    return name if _COUNTERS.get(name) == "pictures" else f"the {name}"


def many(name: str) -> str:
    """Name several: "cats", "oxen", "bunches of grapes"."""
    if name in _COUNTERS:
        return f"{_COUNTERS[name]} of {name}"
    if name in _IRREGULAR:
        return _IRREGULAR[name]
    *before, last = name.split(" ")
    return " ".join([*before, _plural(last)])


def is_there(name: str) -> str:
    """Begin a question: "is there a cat", "are there grapes"."""
    plural = name in _COUNTERS and _COUNTERS[name] not in ("portions", "pictures")
    return f"{'are' if plural else 'is'} there {one(name)}"


def counted(name: str, number: int) -> str:
    """Name so many things: "a cat", "two cats"."""
    return one(name) if number == 1 else f"{NUMBERS[number]} {many(name)}"


def _plural(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"
