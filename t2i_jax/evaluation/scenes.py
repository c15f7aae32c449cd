"""Reads a generated picture of the scenes world back into objects, and checks its caption.

No network is involved, so that a score is exact, cheap and the same everywhere. The reader inverts
the drawing:

1. the background is a plane through the pixels that resemble the border;
2. every pixel is `background + alpha * (colour - background)`, which gives it an opacity alpha;
3. connected pixels of high opacity are an object, unless they are much smaller than one, and their
   colour is the palette's nearest, along the line from the background;
4. the opacities of an object are compared with those of each shape, drawn with the same centroid
   and area, sharp and soft: the best match is its shape, or None if even that is poor.

A generated picture is soft, a little noisy and slightly wrong in colour and outline, which all of
this allows for. What cannot be read (specks, pale or dark things) counts as an object, so that
clutter satisfies no caption; nor does a background or a colour that is none of the world's.
"""

from collections.abc import Sequence
import dataclasses
import functools
import itertools
import math

import numpy as np
from scipy import ndimage

from t2i_jax.data import drawing
from t2i_jax.data.scenes import CATEGORIES, Prompt
from t2i_jax.evaluation.intervals import proportion

_MAX_SIDE = 32  # larger pictures are reduced to this, smaller ones are read as they are
_MIN_SIDE = 16
_ALPHA = 0.45  # opacity from which a pixel is an object's
_SPECK = 0.014  # share of the canvas below which things are ignored: a third of any object's
_LITTER = 0.035  # share of the canvas from which ignored things together are not ignored
_GHOST = 35  # levels of 255 off the background from which a pixel shows something, however pale
_MATCH = 0.9  # cosine with the best template below which a shape is unreadable
_BLUR = 0.033  # standard deviation of the soft templates' blur, in canvases: 0.8 pixels of 24
_LARGE = 11.5 / 24  # width of an object, in canvases, that parts small from large
_DOMINANCE = 0.8  # largest offset across a relation's axis, relative to that along it

_PALETTE = np.array(list(drawing.COLORS.values()), np.float32)
_PALETTE_NAMES = tuple(drawing.COLORS)
_GROUNDS = np.array(list(drawing.BACKGROUNDS.values()), np.float32)
_GROUND_NAMES = tuple(drawing.BACKGROUNDS)


@dataclasses.dataclass(frozen=True, slots=True)
class Detection:
    """An object read from an image: centre and width are in canvases, `match` in 0 to 1.

    `shape` or `color` is None where it resembles none of the world's.
    """

    shape: str | None
    color: str | None
    x: float
    y: float
    size: float
    match: float


def _moments(shape: str, width: int = 256) -> tuple[float, float]:
    """Area over size squared, and how far below the box's centre the centroid lies, over size."""
    axis = (np.arange(width) + 0.5) / width * 1.1 - 0.55
    inside = drawing.coverage(shape, axis[None, :], axis[:, None], 1.0, 1.1 / width)
    return float(inside.mean() * 1.1**2), float((inside.sum(1) * axis).sum() / inside.sum())


_MOMENTS = {shape: _moments(shape) for shape in drawing.SHAPES}


def _reduce(image: np.ndarray) -> np.ndarray:
    """Area average to at most _MAX_SIDE on each side."""
    image = image.astype(np.float32)
    for axis in (0, 1):
        length = image.shape[axis]
        if length > _MAX_SIDE:
            edges = np.linspace(0, length, _MAX_SIDE + 1)
            pixel = np.arange(length)
            overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
            weights = np.maximum(overlap, 0).astype(np.float32) * (_MAX_SIDE / length)
            image = np.moveaxis(np.tensordot(weights, image, (1, axis)), 0, axis)
    return image


def _fit_background(image: np.ndarray) -> np.ndarray:
    """The background's colour at every pixel: (H, W, 3)."""
    height, width, _ = image.shape
    border = np.concatenate(
        [image[:2].reshape(-1, 3), image[-2:].reshape(-1, 3), image[:, 0], image[:, -1]]
    )
    level = np.median(border, axis=0)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    basis = np.stack([np.ones_like(x), x / width - 0.5, y / height - 0.5], -1).reshape(-1, 3)
    near = (np.abs(image - level).max(-1) < 40).ravel()
    if near.sum() < 0.2 * near.size:
        return np.broadcast_to(level, image.shape)
    known = basis[near]
    plane = np.linalg.solve(
        known.T @ known + 1e-3 * np.eye(3, dtype=np.float32), known.T @ image.reshape(-1, 3)[near]
    )
    return (basis @ plane).reshape(image.shape)


def _opacity(difference: np.ndarray, background: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Opacity and distance (..., colour) of pixels as each palette colour over the background.

    The distance is what no opacity explains, and a part of what is missing to full opacity.
    """
    line = _PALETTE - background[..., None, :]
    length = (line**2).sum(-1)
    alpha = np.clip((difference[..., None, :] * line).sum(-1) / length, 0.0, 1.1)
    rest = ((difference[..., None, :] - alpha[..., None] * line) ** 2).sum(-1)
    return alpha, np.sqrt(rest + 0.25 * np.square(1.0 - np.minimum(alpha, 1.0)) * length)


def _cosines(alpha: np.ndarray, templates: np.ndarray) -> np.ndarray:
    norms = np.sqrt((alpha**2).sum() * (templates**2).sum((1, 2)))
    return (templates * alpha).sum((1, 2)) / (norms + 1e-6)


def _grid(*values) -> list[np.ndarray]:
    """All combinations of some values of each kind, each kind as (combinations, 1, 1)."""
    return [
        grid.reshape(-1, 1, 1) for grid in np.meshgrid(*(np.array(v, np.float32) for v in values))
    ]


_SCALE, _ASPECT = _grid((0.93, 1.0, 1.08), (0.92, 1.0, 1.09))
_RIGHT, _DOWN = _grid((-0.06, 0.0, 0.06), (-0.06, 0.0, 0.06))


@functools.cache
def _blurring(length: int, sigma: float) -> np.ndarray:
    """Matrix (length, length) of a Gaussian blur."""
    place = np.arange(length, dtype=np.float32)
    weights = np.exp(-0.5 * ((place[:, None] - place[None, :]) / sigma) ** 2)
    return weights / (sigma * math.sqrt(2 * math.pi))


def _match_shape(alpha: np.ndarray, side: int) -> tuple[str | None, float, float, float, float]:
    """Shape, box centre and size in pixels, and match of the opacities of one object (H, W).

    Scale and aspect are searched around those of the measured area, sharp and soft, then the place.
    """
    height, width = alpha.shape
    y = np.arange(height, dtype=np.float32)[:, None] + 0.5
    x = np.arange(width, dtype=np.float32)[None, :] + 0.5
    mass = max(float(alpha.sum()), 1.0)
    cx, cy = float((alpha * x).sum()) / mass, float((alpha * y).sum()) / mass
    rows, columns = _blurring(height, _BLUR * side), _blurring(width, _BLUR * side)
    best = (None, cx, cy, math.sqrt(mass), 0.0)
    for shape, (area, drop) in _MOMENTS.items():
        size = math.sqrt(mass / area)
        top = cy - drop * size
        sharp = drawing.coverage(shape, (x - cx) * _ASPECT, (y - top) / _ASPECT, size * _SCALE)
        cosines = np.stack([_cosines(alpha, sharp), _cosines(alpha, rows @ sharp @ columns)])
        soft, at = np.unravel_index(cosines.argmax(), cosines.shape)
        scale, aspect = float(_SCALE[at, 0, 0]), float(_ASPECT[at, 0, 0])
        x_moved, y_moved = x - cx - _RIGHT * size, y - top - _DOWN * size
        moved = drawing.coverage(shape, x_moved * aspect, y_moved / aspect, size * scale)
        match = float(_cosines(alpha, rows @ moved @ columns if soft else moved).max())
        if match > best[-1]:
            best = (shape, cx, top, size, match)
    return best if best[-1] >= _MATCH else (None, *best[1:])


def _read(image: np.ndarray) -> tuple[list[Detection], str | None]:
    """The objects of an image and the name of its background, None if it resembles none."""
    image = np.asarray(image)
    fits = image.ndim == 3 and image.shape[2] == 3
    if image.dtype != np.uint8 or not fits or min(image.shape[:2]) < _MIN_SIDE:
        raise ValueError(
            f"an image must be uint8 (height, width, 3) of at least {_MIN_SIDE} pixels a side, "
            f"got {image.dtype} {image.shape}"
        )
    image = _reduce(image)
    height, width, _ = image.shape
    background = _fit_background(image)
    ground = background.mean((0, 1))
    gaps = np.linalg.norm(_GROUNDS - ground, axis=1)
    ground_name = _GROUND_NAMES[gaps.argmin()] if gaps.min() < 45 else None
    difference = image - background
    alphas, distances = _opacity(difference, background)
    alpha = np.take_along_axis(alphas, distances.argmin(-1)[..., None], -1)[..., 0]
    labels, count = ndimage.label(alpha > _ALPHA)
    ghosts = np.abs(difference).max(-1) > _GHOST
    if count:
        ghosts &= ~ndimage.binary_dilation(labels > 0, iterations=2)
    clutter = [Detection(None, None, 0.5, 0.5, 0.0, 0.0)]
    if not count:
        return clutter if ghosts.mean() > _LITTER else [], ground_name
    masses = ndimage.sum_labels(alpha, labels, np.arange(1, count + 1)) / (height * width)
    kept = np.flatnonzero(masses >= _SPECK) + 1
    nearest = ndimage.distance_transform_edt(
        labels == 0, return_distances=False, return_indices=True
    )
    owner = labels[tuple(nearest)]
    boxes = ndimage.find_objects(labels)
    found = []
    for k in kept:
        rows, cols = (slice(max(s.start - 2, 0), s.stop + 2) for s in boxes[k - 1])
        found.append(
            _read_object(difference, background, alpha, labels == k, owner == k, rows, cols)
        )
    if masses.sum() - masses[kept - 1].sum() + ghosts.mean() > _LITTER:
        found += clutter
    return found, ground_name


def _read_object(difference, background, alpha, member, own, rows, cols) -> Detection:
    height, width = member.shape
    core = member & (alpha >= np.median(alpha[member]))
    color = np.median(difference[core], axis=0)
    _, distance = _opacity(color, background[core].mean(0))
    name = _PALETTE_NAMES[distance.argmin()] if distance.min() < 90 else None
    solid = np.clip(difference[rows, cols] @ color / max(float(color @ color), 1.0), -0.3, 1.2)
    solid *= own[rows, cols]
    shape, x, y, size, match = _match_shape(solid, max(height, width))
    return Detection(
        shape,
        name,
        (x + cols.start) / width,
        (y + rows.start) / height,
        size / math.sqrt(height * width),
        match,
    )


def detect(image: np.ndarray) -> list[Detection]:
    """The objects in a uint8 (H, W, 3) image, at least 16 pixels a side."""
    return _read(image)[0]


def _related(first: Detection, second: Detection, relation: str) -> bool:
    along, across = first.x - second.x, first.y - second.y
    if relation in ("above", "below"):
        along, across = across, along
    if relation in ("above", "left"):
        along = -along
    return along > 0 and abs(across) <= _DOMINANCE * along


def check(image: np.ndarray, prompt: Prompt) -> bool:
    """Whether an image shows a prompt's objects, all and no other, as the prompt describes them."""
    found, ground = _read(image)
    if len(found) != len(prompt.objects) or ground is None:
        return False
    if prompt.background not in (None, ground) or any(item.color is None for item in found):
        return False
    if prompt.size and any((item.size > _LARGE) != (prompt.size == "large") for item in found):
        return False
    for items in itertools.permutations(found):
        fits = all(
            item.shape == shape and color in (None, item.color)
            for item, (shape, color) in zip(items, prompt.objects, strict=True)
        )
        if fits and (prompt.relation is None or _related(items[0], items[1], prompt.relation)):
            return True
    return False


def passes(images: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> list[bool]:
    """Which of the images satisfy their prompts. Raises ValueError for none, or unequal numbers."""
    if len(images) != len(prompts) or not len(prompts):
        raise ValueError(
            f"a score needs one image for each prompt and at least one, got {len(images)} images "
            f"and {len(prompts)} prompts"
        )
    return [check(image, prompt) for image, prompt in zip(images, prompts, strict=True)]


def score(images: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> dict:
    """How many of the images satisfy their prompts: `summary`. Raises as `passes`."""
    return summary(passes(images, prompts), prompts)


def summary(passed: Sequence[bool], prompts: Sequence[Prompt]) -> dict:
    """What the images' passes come to.

    Returns `overall`, the mean over the categories present, as GenEval reports it; `micro`, of all
    images alike; and `categories`, of each that is present. These two give fraction, passed, n and
    Wilson's 95% interval of the fraction. `overall` is `micro`'s fraction only where the categories
    are equally frequent, as they are in the heldout split.
    """
    groups = {
        category: [
            ok for ok, prompt in zip(passed, prompts, strict=True) if prompt.category == category
        ]
        for category in CATEGORIES
    }
    categories = {category: proportion(group) for category, group in groups.items() if group}
    overall = sum(group["fraction"] for group in categories.values()) / len(categories)
    return {"overall": overall, "micro": proportion(passed), "categories": categories}
