"""Spaces by name."""

from functools import lru_cache

from latency_profiler.errors import InvalidInput, UnknownSpace
from latency_profiler.spaces import lenet, mobilenet_v1, mobilenet_v2, resnet, vgg
from latency_profiler.spaces.space import Blueprint, Draw, Space

SPACES: dict[str, Draw] = {
    "lenet_300_100": lenet.draw_300_100,
    "lenet_5": lenet.draw_5,
    "mobilenet_v1": mobilenet_v1.draw,
    "mobilenet_v2": mobilenet_v2.draw,
    "resnet20": resnet.draw_resnet20,
    "resnet50": resnet.draw_resnet50,
    "resnet56": resnet.draw_resnet56,
    "vgg16": vgg.draw,
}
IMAGE_SIZES = (8, 512)
WIDTHS = (0.05, 4.0)
CLASSES = (2, 100_000)


@lru_cache(maxsize=256)
def get_space(
    name: str, image_size: int = 224, width: float = 1.0, classes: int = 1000, free_last: bool = False
) -> Space:
    """The space of this name at an image size, width multiplier and class count.

    `free_last` makes the width before the classifier a gene; as published it is fixed.

    Raises:
        UnknownSpace: no space has this name.
        InvalidInput: a number is outside its range.
    """
    if name not in SPACES:
        raise UnknownSpace(name, sorted(SPACES))
    for what, value, (low, high) in (
        ("image size", image_size, IMAGE_SIZES), ("width multiplier", width, WIDTHS), ("class count", classes, CLASSES),
    ):  # fmt: skip
        if not low <= value <= high:
            raise InvalidInput(f"the {what} is {value:g}; it must be {low:g} to {high:g}")
    return SPACES[name](Blueprint(image_size, width, classes, free_last))
