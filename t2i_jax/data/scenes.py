"""A procedural text-to-image world: captioned scenes in GenEval's six categories, with no files.

It is the data that anyone has, so that the whole system can be trained, and its prompt following
measured, in minutes on a laptop: pictures of a few coloured shapes, captions with real paraphrases,
and combinations that are *held out*. A scene has a set of keys (`keys`), one for each combination
that it shows. The keys in `HELD_OUT` are never shown by a training scene, whatever its category; a
held-out prompt shows one kind of them, that which its category tests, and no other. What a picture
looks like is in `drawing`; `t2i_jax.evaluation.scenes` reads it back.

Element i of a split is a function of (seed, split, i) alone: access is random, and any number of
readers agree.
"""

import bisect
from collections.abc import Mapping
import dataclasses
import functools
import itertools
import operator
from typing import NamedTuple
import zlib

from t2i_jax.data import drawing
from t2i_jax.data.built_in import BuiltIn
from t2i_jax.data.drawing import INVERSE, RELATIONS, SHAPES, SIZES, Draws, Object, Scene

# The categories, and the kind of key that each tests.
KINDS = {
    "single_object": "setting",
    "two_objects": "shapes",
    "counting": "count",
    "colors": "pair",
    "position": "relation",
    "color_attribution": "attribution",
}
CATEGORIES = tuple(KINDS)
# How often each is shown in training: a relation that turns the order of mention around is what
# takes the most learning, then counting.
WEIGHTS = dict.fromkeys(CATEGORIES, 1.0) | {"counting": 2.0, "position": 4.0}
COLORS = tuple(drawing.COLORS)
BACKGROUNDS = tuple(drawing.BACKGROUNDS)
COUNTS = (2, 3, 4)
SPLITS = ("train", "validation", "heldout")


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """A caption and what it asks for, which is all that the scorer checks.

    `objects` are (shape, colour or None), repeated where there are several. `relation` is that of
    the first object to the second. What the caption does not name is None: `size` is otherwise
    'small' or 'large'.
    """

    category: str
    text: str
    objects: tuple[tuple[str, str | None], ...]
    relation: str | None = None
    size: str | None = None
    background: str | None = None


# --- Combinations -------------------------------------------------------------------------------


class _Core(NamedTuple):
    """What a scene shows: (colour, shape) things, and what else makes a difference to its keys."""

    things: tuple[tuple[str, str], ...]
    relation: str | None = None
    size: str | None = None
    background: str | None = None


def _core_keys(core: _Core) -> set[tuple]:
    found = {("pair", color, shape) for color, shape in core.things}
    first, last = core.things[0], core.things[-1]
    if len(core.things) == 1:
        found.add(("setting", first[1], core.size, core.background))
    elif first == last:
        found.add(("count", len(core.things), *first))
    else:
        found.add(("shapes", frozenset((first[1], last[1])), core.background))
        if first[0] != last[0]:
            found.add(("attribution", frozenset((first, last))))
        if core.relation:
            one, relation, other = first, core.relation, last
            if one > other:
                one, relation, other = other, INVERSE[relation], one
            found.add(("relation", one, relation, other))
    return found


def keys(scene: Scene) -> set[tuple]:
    """The combinations that a scene shows, read from its objects and not from its caption.

    ('pair', colour, shape), ('setting', shape, size, background), ('count', n, colour, shape),
    ('shapes', {shape, shape}, background), ('attribution', {thing, thing}) and ('relation', thing,
    relation, thing), where a thing is (colour, shape). A relation is told from the thing that sorts
    first, so that "A above B" and "B below A" are one key.
    """
    things = tuple((item.color, item.shape) for item in scene.objects)
    relation = drawing.relation_of(*scene.objects) if len(things) == 2 else None
    width = scene.objects[0].size * drawing.CANVAS
    size = next((name for name, (_, most) in SIZES.items() if width <= most), "large")
    return _core_keys(_Core(things, relation, size, scene.background))


def _cores(category: str) -> list[_Core]:
    """Everything that a category can show, in a fixed order."""
    things = tuple(itertools.product(COLORS, SHAPES))
    if category in ("single_object", "colors"):
        return [
            _Core((thing,), None, *rest)
            for thing, *rest in itertools.product(things, SIZES, BACKGROUNDS)
        ]
    if category == "counting":
        return [_Core((thing,) * n) for thing, n in itertools.product(things, COUNTS)]
    pairs = [pair for pair in itertools.product(things, things) if pair[0][1] != pair[1][1]]
    if category == "color_attribution":
        pairs = [pair for pair in pairs if pair[0][0] != pair[1][0]]
    # Where a caption says nothing else, what it names first stands to the left.
    relations = RELATIONS if category == "position" else ("left",)
    return [
        _Core(pair, relation, background=background)
        for pair, relation, background in itertools.product(pairs, relations, BACKGROUNDS)
    ]


_HELD_OUT_PAIRS = {
    "ring": "yellow",
    "square": "purple",
    "triangle": "green",
    "cross": "blue",
}
_PAIRS_OF_SHAPES = tuple(map(frozenset, itertools.combinations(SHAPES, 2)))


def _stable_hash(*parts) -> int:
    return zlib.crc32(repr(parts).encode())


def _is_held_out(kind: str, *rest) -> bool:
    """The rule behind `HELD_OUT`: about one combination in five of each kind."""
    match kind, *rest:
        case "pair", color, shape:
            return _HELD_OUT_PAIRS[shape] == color
        case "shapes", shapes, background:
            place = _PAIRS_OF_SHAPES.index(shapes) + 2 * BACKGROUNDS.index(background)
            return place % 5 == 0
        case "count", n, color, shape:
            return (n + COLORS.index(color) + SHAPES.index(shape)) % 5 == 0
        case "setting", shape, size, background:
            if size == "medium":  # has no word, so that no prompt could ask for it
                return False
            place = SHAPES.index(shape) + 2 * (size == "large") + BACKGROUNDS.index(background)
            return place % 5 == 0
        case "attribution", things:
            return _stable_hash("attribution", *sorted(things)) % 5 == 0
        case _, first, relation, second:
            # At most one relation of two things: the other three are there to learn from.
            return _stable_hash("relation", first, second) % 5 == RELATIONS.index(relation)


def _held_out() -> dict[str, frozenset]:
    cores = itertools.chain.from_iterable(map(_cores, CATEGORIES))
    held_out = {key for core in cores for key in _core_keys(core) if _is_held_out(*key)}
    return {kind: frozenset(key for key in held_out if key[0] == kind) for kind in KINDS.values()}


HELD_OUT = _held_out()  # kind -> keys
_HELD_OUT_KEYS = frozenset().union(*HELD_OUT.values())


@functools.cache
def _choices(category: str, held_out: bool) -> tuple[_Core, ...]:
    """What a split draws from: without held-out keys, or with those of the category's kind only."""
    wanted = {KINDS[category]} if held_out else set()
    return tuple(
        core
        for core in _cores(category)
        if {key[0] for key in _core_keys(core) & _HELD_OUT_KEYS} == wanted
    )


# --- Captions -----------------------------------------------------------------------------------

_MAX_WORDS = 14
_PLAIN = ("a {z}{s}", "a {z}{s}", "a {z}{s}", "one {z}{s}", "a single {z}{s}")
_COLORED = ("a {z}{c} {s}",) * 9 + ("one {z}{c} {s}", "a {z}{s} that is {c}", "a {z}{s} in {c}")
_SIZED = {"small": ("small", "small", "little"), "large": ("large", "large", "big")}
_PREFIX = ("", "", "", "", "a picture of ", "an image of ", "a drawing of ", "there is ", "we see ")
_ONE = ("{a}", "{a}", "{a}", "just {a}", "{a} and nothing else", "{a} by itself")
_TWO = (
    "{a} and {b}",
    "{a} and {b}",
    "{a} with {b}",
    "{a} together with {b}",
    "{a} next to {b}",
    "{a} and also {b}",
)
_BACKGROUND = (
    "{t} on a {b} background",
    "{t} on a {b} background",
    "{t} against a {b} background",
    "{t}, {b} background",
    "on a {b} background, {t}",
)
_WORDS = {2: "two", 3: "three", 4: "four"}
_PLURAL = {shape: "crosses" if shape == "cross" else shape + "s" for shape in SHAPES}
_COUNT_PREFIX = ("", "", "", "a picture of ", "an image of ", "there are ", "exactly ", "we see ")
_COUNT = ("{n} {p}", "{n} {p}", "{n} {p} and nothing else")
_COUNT_COLORED = (
    "{n} {c} {p}",
    "{n} {c} {p}",
    "{n} {c} {p}",
    "{n} {p} that are {c}",
    "{n} {p} in {c}",
)
_COUNT_TWO = ("two {p}, both of them {c}", "a pair of {c} {p}")
_COUNT_MORE = ("{n} {p}, all of them {c}", "a group of {n} {c} {p}")
_RELATION = {
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under"),
    "left": ("to the left of", "to the left of", "left of"),
    "right": ("to the right of", "to the right of", "right of"),
}
_OF_IT = {
    "above": "above it",
    "below": "below it",
    "left": "to its left",
    "right": "to its right",
}
_END = {
    "above": "at the top",
    "below": "at the bottom",
    "left": "on the left",
    "right": "on the right",
}
_POSITION = ("{a} {r} {b}",) * 9 + (
    "{a} is {r} {b}",
    "{b} with {a} {i}",
    "{b}, and {i} {a}",
    "{a} {e} and {b} {f}",
)


def _write_count(core: _Core, colored: bool, draw: Draws) -> str:
    color, shape = core.things[0]
    n, frames = len(core.things), _COUNT
    if colored:
        frames = _COUNT_COLORED + (_COUNT_TWO if n == 2 else _COUNT_MORE)
    frame = draw.choose(frames)
    prefix = draw.choose(_COUNT_PREFIX) if frame.startswith("{n}") else ""
    return prefix + frame.format(n=_WORDS[n], p=_PLURAL[shape], c=color)


def _write_objects(category: str, core: _Core, colored: bool, size: str | None, draw: Draws) -> str:
    forms = _COLORED if colored else _PLAIN
    adjective = draw.choose(_SIZED[size]) + " " if size else ""
    phrases = [
        draw.choose(forms).format(c=color, s=shape, z=adjective) for color, shape in core.things
    ]
    prefix = draw.choose(_PREFIX)
    if len(phrases) == 1:
        return prefix + draw.choose(_ONE).format(a=phrases[0])
    a, b = phrases
    if category != "position":
        return prefix + draw.choose(_TWO).format(a=a, b=b)
    frame, relation = draw.choose(_POSITION), core.relation
    text = frame.format(
        a=a,
        b=b,
        r=draw.choose(_RELATION[relation]),
        i=_OF_IT[relation],
        e=_END[relation],
        f=_END[INVERSE[relation]],
    )
    return text if " is " in frame else prefix + text


def _write(category: str, core: _Core, held_out: bool, draw: Draws) -> Prompt:
    """A caption of a core; a held-out one names all that its key consists of."""
    kind, wish = KINDS[category], draw()
    colored = kind in ("pair", "attribution")
    if kind == "count":
        colored = wish < 0.8 or held_out
    elif kind == "relation":  # learned from the plain ones first
        colored = wish < 0.5 or held_out
    setting = kind == "setting"
    size = core.size if core.size in _SIZED and (draw() < 0.6 or (setting and held_out)) else None
    named = draw() < (0.2 if colored else 0.5)
    named = named or (held_out and kind in ("setting", "shapes"))
    while True:
        if category == "counting":
            text = _write_count(core, colored, draw)
        else:
            text = _write_objects(category, core, colored, size, draw)
        if named:
            text = draw.choose(_BACKGROUND).format(t=text, b=core.background)
        if text.count(" ") + text.count(",") < _MAX_WORDS:
            break
    objects = tuple((shape, color if colored else None) for color, shape in core.things)
    relation = core.relation if category == "position" else None
    return Prompt(category, text, objects, relation, size, core.background if named else None)


def _compose(category: str, core: _Core, draw: Draws) -> Scene:
    places = drawing.arrange(
        draw, len(core.things), core.size, core.relation, alike=category == "counting"
    )
    objects = []
    for (color, shape), place in zip(core.things, places, strict=True):
        rgb = tuple(level + draw.uniform(-12, 12) for level in drawing.COLORS[color])
        objects.append(Object(shape, color, *place, rgb))
    shade, ramp = draw.uniform(0.85, 1.15), draw() < 0.5
    rgb = tuple(shade * level for level in drawing.BACKGROUNDS[core.background])
    gradient = (draw.uniform(-10, 10), draw.uniform(-10, 10)) if ramp else (0.0, 0.0)
    return Scene(category, tuple(objects), core.background, rgb, gradient)


# --- The data set -------------------------------------------------------------------------------


class Scenes(BuiltIn):
    """A random-access data set of {'image': uint8 (H, W, 3), 'captions': (str,), 'category': str}.

    'train' and 'validation' are disjoint streams of one distribution, whose categories are drawn by
    `weights` (category -> relative weight, those left out never; None means `WEIGHTS`). 'heldout'
    has the held-out combinations; element i is of category i % 6: every prefix is balanced.
    """

    def __init__(
        self,
        image_size: int = 24,
        split: str = "train",
        seed: int = 0,
        length: int = 1_000_000,
        weights: Mapping[str, float] | None = None,
    ):
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
        if image_size < 16:
            raise ValueError(
                f"image_size must be at least 16 pixels, to tell shapes apart, got {image_size}"
            )
        if seed < 0 or length < 0:
            raise ValueError(
                f"seed and length must not be negative, got seed {seed} and length {length}"
            )
        if weights is not None and split == "heldout":
            raise ValueError(
                "weights do not apply to the heldout split, whose categories take turns"
            )
        weights = dict(WEIGHTS if weights is None else weights)
        unknown = sorted(set(weights) - set(CATEGORIES))
        if unknown or min(weights.values(), default=0) < 0 or not sum(weights.values()) > 0:
            raise ValueError(
                f"weights must be positive and for {', '.join(CATEGORIES)}, got {weights}"
            )
        self.image_size, self.split, self.seed, self._length = image_size, split, seed, length
        totals = list(itertools.accumulate(weights.get(category, 0.0) for category in CATEGORIES))
        self._shares = [total / totals[-1] for total in totals]

    def __len__(self) -> int:
        return self._length

    def _begin(self, index: int) -> tuple[Prompt, _Core, Draws]:
        index = operator.index(index)
        if not 0 <= index < self._length:
            raise IndexError(f"index {index} is outside the {self._length} scenes")
        draw = Draws(self.seed, SPLITS.index(self.split), index)
        held_out = self.split == "heldout"
        at = index % len(CATEGORIES) if held_out else bisect.bisect_right(self._shares, draw())
        core = draw.choose(_choices(CATEGORIES[at], held_out))
        if core.background is None:
            core = core._replace(background=draw.choose(BACKGROUNDS))
        return _write(CATEGORIES[at], core, held_out, draw), core, draw

    def prompt(self, index: int) -> Prompt:
        """The caption of an element and what it asks for, without drawing."""
        return self._begin(index)[0]

    def caption(self, index: int) -> str:
        return self._begin(index)[0].text

    def scene(self, index: int) -> Scene:
        """What an element's image shows."""
        prompt, core, draw = self._begin(index)
        return _compose(prompt.category, core, draw)

    def __getitem__(self, index: int) -> dict:
        prompt, core, draw = self._begin(index)
        image = drawing.render(_compose(prompt.category, core, draw), self.image_size)
        return {"image": image, "captions": (prompt.text,), "category": prompt.category}
