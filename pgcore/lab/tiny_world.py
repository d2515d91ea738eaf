"""The world of the tiny PaliGemma: which things it knows, and the book's own scene."""

from pgcore.lab.scenes import Scene, SceneSettings, compose

# What the emoji SigLIP names right when the validation artist drew it, and the things
# of the book's own scene.
CONCEPTS = (
    *("cat", "red apple", "guitar", "rocket"),
    *("monkey", "panda", "dolphin", "hatching chick", "lemon", "watermelon"),
    *("pineapple", "grapes", "hot pepper", "bread", "french fries", "hamburger"),
    *("rice ball", "sunflower", "evergreen tree", "mushroom", "ambulance"),
    *("police car", "scissors", "hammer", "light bulb", "candle", "bell", "bomb"),
    *("wine glass", "baby bottle", "basketball", "baseball", "bullseye", "balloon"),
    *("artist palette", "saxophone", "top hat", "t-shirt", "sunglasses", "ring"),
    *("rainbow", "cloud", "droplet", "snowflake", "fire", "memo"),
    *("graduation cap", "alarm clock"),
)
SCENES = SceneSettings(concepts=CONCEPTS)


def running_example() -> Scene:
    """The scene of this book: a rocket, a cat and a guitar."""
    things = "cat", "red apple", "guitar", "rocket"
    settings = SceneSettings(styles=("noto",), concepts=things, objects=(2, 3))
    return compose(settings, 0, 12)
