"""The look of the scenes world: its palette and shapes, where they stand, how they are drawn.

A shape is a function from coordinates to *coverage*, the share of a pixel that lies inside, taken
from the signed distance to the outline. That is anti-aliased at any size without supersampling,
costs a few array operations on the object's own window, and gives the scorer its templates: the
picture and the reading of it share one definition of each shape.

Coordinates are canvas fractions with the origin at the top left, x to the right and y downwards.
"""

from collections.abc import Callable
import dataclasses

import numpy as np

COLORS = {
    "red": (224, 44, 44),
    "green": (52, 200, 76),
    "blue": (52, 96, 240),
    "yellow": (244, 214, 48),
    "purple": (172, 64, 208),
    "white": (242, 242, 242),
}
BACKGROUNDS = {"black": (13, 13, 15), "grey": (74, 74, 76), "brown": (92, 58, 28)}

RELATIONS = ("above", "below", "left", "right")
INVERSE = {"above": "below", "below": "above", "left": "right", "right": "left"}

# Layouts are made in pixels of a 24-pixel canvas, and returned in fractions of it.
CANVAS = 24.0
SIZES = {"small": (8.5, 9.5), "medium": (10.75, 11.75), "large": (13.0, 14.0)}  # of one object
_SIZES_OF_TWO = (9.2, 9.9)
_SIZES_OF_MANY = (8.2, 8.9)  # of three and four
_FIRST, _MIDDLE, _SECOND = 6.25, 12.0, 17.75  # rows and columns that objects stand on
_CELLS = tuple((x, y) for y in (_FIRST, _SECOND) for x in (_FIRST, _SECOND))
# How far off these they stand, along x or y: boxes of several are over half a pixel apart.
_JITTER_ALONE = 1.5
_JITTER_BETWEEN, _JITTER_ACROSS = 0.3, 1.0  # of two: towards each other, and across
_JITTER = 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class Object:
    """One object: the centre of its bounding box and its width, as fractions of the canvas.

    `rgb` (0 to 255) is the colour as drawn, by default the palette's.
    """

    shape: str
    color: str
    x: float
    y: float
    size: float
    rgb: tuple[float, float, float] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """Objects on a background, its shade `rgb` rising by `gradient` (x, y) over the canvas."""

    category: str
    objects: tuple[Object, ...]
    background: str
    rgb: tuple[float, float, float] | None = None
    gradient: tuple[float, float] = (0.0, 0.0)


class Draws:
    """Uniform random draws that depend on the seed alone.

    They are taken from the generator in blocks, because single ones cost far more.
    """

    def __init__(self, *seed: int):
        self._generator = np.random.default_rng(seed)
        self._block = []

    def __call__(self) -> float:
        if not self._block:
            self._block = self._generator.random(48).tolist()
        return self._block.pop()

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self()

    def choose(self, items):
        return items[int(self() * len(items))]


def relation_of(first: Object, second: Object) -> str:
    """The first object's relation to the second, on the axis on which they are further apart."""
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def _one(draw: Draws, size: str) -> list[tuple[float, float, float]]:
    x, y = (_MIDDLE + draw.uniform(-_JITTER_ALONE, _JITTER_ALONE) for _ in "xy")
    return [(x, y, draw.uniform(*SIZES[size]))]


def _two(draw: Draws, relation: str, spread: float) -> list[tuple[float, float, float]]:
    width, places = draw.uniform(*_SIZES_OF_TWO), []
    ends = (_FIRST, _SECOND) if relation in ("above", "left") else (_SECOND, _FIRST)
    for end in ends:
        along = end + draw.uniform(-_JITTER_BETWEEN, _JITTER_BETWEEN)
        across = _MIDDLE + draw.uniform(-_JITTER_ACROSS, _JITTER_ACROSS)
        x, y = (across, along) if relation in ("above", "below") else (along, across)
        places.append((x, y, width * draw.uniform(1 - spread, 1 + spread)))
    return places


def _many(draw: Draws, n: int, spread: float) -> list[tuple[float, float, float]]:
    cells, width, places = list(_CELLS), draw.uniform(*_SIZES_OF_MANY), []
    for _ in range(n):
        x, y = (c + draw.uniform(-_JITTER, _JITTER) for c in cells.pop(int(draw() * len(cells))))
        places.append((x, y, width * draw.uniform(1 - spread, 1 + spread)))
    return places


def arrange(
    draw: Draws,
    n: int,
    size: str | None = None,
    relation: str | None = None,
    alike: bool = False,
) -> list[tuple[float, float, float]]:
    """Centre x, y and width, in canvases, of n objects that do not touch.

    One object has the named size and stands about the middle. Two stand in the relation, or from
    left to right if there is none; three and four about the centres of a two-by-two lattice. Those
    that are alike differ less in width.
    """
    spread = 0.015 if alike else 0.03
    if n == 1:
        places = _one(draw, size)
    elif n == 2:
        places = _two(draw, relation or "left", spread)
    else:
        places = _many(draw, n, spread)
    return [tuple(length / CANVAS for length in place) for place in places]


def _ring(x, y, size, edge):
    return np.clip(0.5 - (np.abs(np.hypot(x, y) - 0.37 * size) - 0.13 * size) / edge, 0.0, 1.0)


def _interval(x, half, edge):
    return np.clip(0.5 - (np.abs(x) - half) / edge, 0.0, 1.0)


def _square(x, y, size, edge):
    half = 0.44 * size
    return _interval(x, half, edge) * _interval(y, half, edge)


def _cross(x, y, size, edge):
    long, short = 0.5 * size, 0.17 * size
    x_short, y_short = _interval(x, short, edge), _interval(y, short, edge)
    bars = _interval(x, long, edge) * y_short + x_short * _interval(y, long, edge)
    return bars - x_short * y_short


def _triangle(x, y, size, edge):
    # Base `size`, height 0.9 `size`, apex up. The slanted sides have the normal (0.9, -0.5) / |.|.
    side = (0.9 * np.abs(x) - 0.5 * y - 0.225 * size) / np.hypot(0.9, 0.5)
    return np.clip(0.5 - np.maximum(side, y - 0.45 * size) / edge, 0.0, 1.0)


_COVERAGE: dict[str, Callable] = {
    "ring": _ring,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
}
SHAPES = tuple(_COVERAGE)


def coverage(shape: str, x, y, size, edge=1.0) -> np.ndarray:
    """Share of each point's pixel inside a shape centred at the origin, 0 to 1.

    `x`, `y`, `size` and `edge`, the width over which the outline fades, are in pixels and
    broadcast together.
    """
    if shape not in _COVERAGE:
        raise ValueError(f"unknown shape {shape!r}; the shapes are {', '.join(SHAPES)}")
    return _COVERAGE[shape](x, y, size, edge)


def _backdrop(scene: Scene, image_size: int) -> np.ndarray:
    rgb = BACKGROUNDS[scene.background] if scene.rgb is None else scene.rgb
    image = np.empty((image_size, image_size, 3), np.float32)
    image[:] = rgb
    gx, gy = scene.gradient
    if gx or gy:
        ramp = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size - 0.5
        image += (gx * ramp[None, :] + gy * ramp[:, None])[:, :, None]
    return image


def render(scene: Scene, image_size: int) -> np.ndarray:
    """Draws a scene as uint8 (image_size, image_size, 3)."""
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
    image = _backdrop(scene, image_size)
    for item in scene.objects:
        cx, cy, size = item.x * image_size, item.y * image_size, item.size * image_size
        reach = 0.5 * size + 1.0
        left, right = max(int(cx - reach), 0), min(int(cx + reach) + 1, image_size)
        top, bottom = max(int(cy - reach), 0), min(int(cy + reach) + 1, image_size)
        x = np.arange(left, right, dtype=np.float32) + np.float32(0.5 - cx)
        y = np.arange(top, bottom, dtype=np.float32) + np.float32(0.5 - cy)
        alpha = coverage(item.shape, x[None, :], y[:, None], size)[:, :, None]
        window = image[top:bottom, left:right]
        rgb = COLORS[item.color] if item.rgb is None else item.rgb
        window += alpha * (np.array(rgb, np.float32) - window)
    return (np.clip(image, 0.0, 255.0) + 0.5).astype(np.uint8)
