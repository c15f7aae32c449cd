import collections
import itertools
import pickle
import zlib

import numpy as np
import pytest

from t2i_jax.data import drawing, scenes
from t2i_jax.data.scenes import CATEGORIES, HELD_OUT, KINDS, Scenes

ALL_HELD_OUT = frozenset().union(*HELD_OUT.values())


def _held_out_kinds(scene):
    return {key[0] for key in scenes.keys(scene) & ALL_HELD_OUT}


def test_an_element_depends_on_seed_split_and_index_alone():
    data = Scenes(seed=3)
    forwards = [data[i] for i in range(40)]
    copy = pickle.loads(pickle.dumps(data))
    for i in reversed(range(40)):
        again = copy[i]
        assert again["image"].tobytes() == forwards[i]["image"].tobytes()
        assert (
            again["captions"][0]
            == forwards[i]["captions"][0]
            == data.caption(i)
            == data.prompt(i).text
        )
        assert again["category"] == data.scene(i).category == data.prompt(i).category
    assert Scenes(seed=3, length=50)[np.int64(7)]["captions"] == forwards[7]["captions"]
    others = [Scenes(seed=4), Scenes(seed=3, split="validation"), Scenes(seed=3, split="heldout")]
    for other in others:
        same = sum((other.caption(i),) == forwards[i]["captions"] for i in range(40))
        assert same < 10


def test_the_streams_are_pinned():
    """A change of the world or of a library's random numbers would make scores incomparable."""
    captions = 0
    for split in scenes.SPLITS:
        for i in range(100):
            captions = zlib.crc32(Scenes(split=split).caption(i).encode(), captions)
    assert captions == 4107771215
    first, second = Scenes(split="heldout").scene(4).objects
    assert (first.shape, first.color, second.shape, second.color) == (
        "ring",
        "red",
        "cross",
        "purple",
    )
    places = [first.x, first.y, first.size, second.x, second.y, second.size]
    assert places == pytest.approx(
        [0.267291, 0.486270, 0.410377, 0.728482, 0.482063, 0.396464], abs=1e-6
    )


@pytest.mark.parametrize("split", ["train", "validation"])
def test_training_never_shows_a_held_out_combination(split):
    data = Scenes(split=split, seed=1)
    seen = set()
    for i in range(5000 if split == "train" else 500):
        scene = data.scene(i)
        seen |= scenes.keys(scene)
        assert not _held_out_kinds(scene), data.caption(i)
    if split == "train":
        # What is held out is held out of something: everything else of these kinds does occur.
        for kind in ("pair", "shapes", "count"):
            cores = itertools.chain.from_iterable(map(scenes._cores, CATEGORIES))
            every = {key for core in cores for key in scenes._core_keys(core) if key[0] == kind}
            pairs = {(c, s) for _, c, s in HELD_OUT["pair"]}
            learnable = {k for k in every if kind != "count" or k[2:] not in pairs}
            assert learnable - seen == HELD_OUT[kind] & learnable


def test_a_held_out_prompt_tests_its_own_kind_of_combination():
    data = Scenes(split="heldout", seed=1)
    seen = collections.defaultdict(set)
    for i in range(3000):
        scene, prompt = data.scene(i), data.prompt(i)
        kind = KINDS[prompt.category]
        assert prompt.category == scene.category == CATEGORIES[i % 6]
        assert _held_out_kinds(scene) == {kind}
        seen[kind] |= scenes.keys(scene) & HELD_OUT[kind]
        named = [color for _, color in prompt.objects]
        assert all(named) == (kind not in ("setting", "shapes"))
        if kind in ("setting", "shapes"):
            assert prompt.background and (prompt.size or kind == "shapes")
        assert bool(prompt.relation) == (kind == "relation")
    assert seen["setting"] == HELD_OUT["setting"] and seen["pair"] == HELD_OUT["pair"]
    assert seen["shapes"] == HELD_OUT["shapes"]


def test_the_held_out_combinations_are_fixed():
    assert HELD_OUT["shapes"] == {
        ("shapes", frozenset({"ring", "square"}), "black"),
        ("shapes", frozenset({"ring", "triangle"}), "brown"),
        ("shapes", frozenset({"square", "triangle"}), "grey"),
        ("shapes", frozenset({"triangle", "cross"}), "black"),
    }
    assert {key[1:] for key in HELD_OUT["pair"]} == {
        ("yellow", "ring"),
        ("purple", "square"),
        ("green", "triangle"),
        ("blue", "cross"),
    }
    assert HELD_OUT["setting"] == {
        ("setting", "ring", "small", "black"),
        ("setting", "cross", "small", "brown"),
        ("setting", "cross", "large", "black"),
        ("setting", "triangle", "large", "grey"),
        ("setting", "square", "large", "brown"),
    }
    sizes = {kind: len(HELD_OUT[kind]) for kind in ("count", "relation", "attribution")}
    assert sizes == {"count": 15, "relation": 171, "attribution": 43}
    assert len({key[1:2] + key[3:] for key in HELD_OUT["relation"]}) == 171  # one of four relations


def test_keys_tell_a_relation_once():
    red = drawing.Object("ring", "red", 0.5, 0.2, 0.3)
    blue = drawing.Object("square", "blue", 0.5, 0.7, 0.3)
    expected = {
        ("pair", "red", "ring"),
        ("pair", "blue", "square"),
        ("shapes", frozenset({"ring", "square"}), "black"),
        ("attribution", frozenset({("red", "ring"), ("blue", "square")})),
        ("relation", ("blue", "square"), "below", ("red", "ring")),
    }
    for objects in ((red, blue), (blue, red)):
        assert scenes.keys(drawing.Scene("position", objects, "black")) == expected


def test_captions_are_varied_short_and_plain():
    data = Scenes(seed=5)
    frames = collections.defaultdict(set)
    words = set()
    plural = {shape + end for shape in scenes.SHAPES for end in ("s", "es")}
    generic = {**dict.fromkeys(scenes.SHAPES, "S"), **dict.fromkeys(plural, "S")}
    generic |= dict.fromkeys(scenes.COLORS, "C") | dict.fromkeys(scenes.BACKGROUNDS, "B")
    for i in range(4000):
        prompt = data.prompt(i)
        text = prompt.text.replace(",", " ,").split()
        assert prompt.text == prompt.text.lower() and len(text) <= 15  # and a token to begin with
        assert all(word == "," or word.isalpha() for word in text)
        words.update(text)
        frames[prompt.category].add(" ".join(generic.get(word, word) for word in text))
    assert all(len(frames[category]) >= 40 for category in CATEGORIES), {
        category: len(found) for category, found in frames.items()
    }
    assert len(words) < 90


def test_a_caption_names_what_its_prompt_requires_and_its_scene_shows():
    for split in scenes.SPLITS:
        data = Scenes(split=split, seed=6)
        for i in range(600):
            prompt, scene = data.prompt(i), data.scene(i)
            shown = [(item.shape, item.color) for item in scene.objects]
            for (shape, color), thing in zip(prompt.objects, shown, strict=True):
                assert shape == thing[0] and color in (None, thing[1])
                assert shape in prompt.text and (color or "") in prompt.text
            unnamed = set(scenes.COLORS) - {color for _, color in prompt.objects}
            assert not any(color in prompt.text.split() for color in unnamed)
            assert ("background" in prompt.text) == (prompt.background is not None)
            assert prompt.background in (None, scene.background)
            if len(shown) == 2:  # from left to right, unless the caption says otherwise
                assert drawing.relation_of(*scene.objects) == (prompt.relation or "left")
            if prompt.size:
                low, high = drawing.SIZES[prompt.size]
                assert low <= 24 * scene.objects[0].size <= high


RELATIONS_IN_WORDS = [
    ("a {a} above a {b}", "above"),
    ("a {a} under a {b}", "below"),
    ("a {a} to the left of a {b}", "left"),
    ("a {b} with a {a} to its right", "right"),
    ("a {b}, and below it a {a}", "below"),
    ("a {a} at the bottom and a {b} at the top", "below"),
    ("a {a} on the left and a {b} on the right", "left"),
]


@pytest.mark.parametrize(("frame", "relation"), RELATIONS_IN_WORDS)
def test_words_of_a_relation_mean_it(frame, relation):
    """Literal captions, read by hand: whenever one is generated, the relation is the right one."""
    things = itertools.permutations(scenes.SHAPES, 2)
    wanted = {frame.format(a=a, b=b): (a, b) for a, b in things}
    data = Scenes(seed=7, weights={"position": 1})
    found = 0
    for i in range(6000):
        prompt = data.prompt(i)
        if prompt.text in wanted:
            first, second = wanted[prompt.text]
            flipped = prompt.objects[0][0] != first
            assert {shape for shape, _ in prompt.objects} == {first, second}
            assert (scenes.INVERSE[prompt.relation] if flipped else prompt.relation) == relation
            found += 1
    assert found


def test_objects_lie_inside_the_canvas_and_apart():
    data = Scenes(seed=8)
    for i in range(1500):
        objects = data.scene(i).objects
        for item in objects:
            half = item.size / 2
            assert min(item.x, item.y) - half >= 0.8 / 24
            assert max(item.x, item.y) + half <= 1 - 0.8 / 24
        for one, other in itertools.combinations(objects, 2):
            distance = max(abs(one.x - other.x), abs(one.y - other.y))
            assert distance - (one.size + other.size) / 2 >= 0.6 / 24
        if data.prompt(i).relation:
            across = min(abs(one.x - other.x), abs(one.y - other.y))
            assert across <= 2.0 / 24 + 1e-9


def test_drawing_has_exact_areas_and_is_the_same_at_every_size():
    area = {
        "ring": np.pi * (0.5**2 - 0.24**2),
        "square": 0.88**2,
        "triangle": 0.45,
        "cross": 2 * 0.34 - 0.34**2,
    }
    axis = np.arange(-20, 20) + 0.5
    for shape in scenes.SHAPES:
        inside = drawing.coverage(shape, axis[None, :] - 0.3, axis[:, None] + 0.1, 24.0)
        assert inside.min() == 0 and inside.max() == 1
        assert inside.sum() == pytest.approx(area[shape] * 24**2, rel=0.01)
    data = Scenes(seed=9)
    for i in range(30):
        scene = data.scene(i)
        fine = drawing.render(scene, 96).astype(float)
        for size in (24, 32, 48):
            k = 96 // size
            coarse = fine.reshape(size, k, size, k, 3).mean((1, 3))
            assert np.abs(drawing.render(scene, size) - coarse).mean() < 3
    for size in (24, 32, 64, 256):
        image = Scenes(image_size=size)[0]["image"]
        assert image.shape == (size, size, 3) and image.dtype == np.uint8


def test_weights_and_bounds():
    often = collections.Counter(Scenes().prompt(i).category for i in range(1600))
    for category, expected in zip(CATEGORIES, (160, 160, 320, 160, 640, 160), strict=True):
        assert abs(often[category] - expected) < 60
    data = Scenes(weights={"counting": 3, "colors": 1}, length=800)
    counts = collections.Counter(data.prompt(i).category for i in range(len(data)))
    assert set(counts) == {"counting", "colors"} and 540 < counts["counting"] < 660
    with pytest.raises(IndexError, match="800"):
        data[800]
    bad = [
        ({"split": "test"}, "train, validation, heldout"),
        ({"image_size": 8}, "16"),
        ({"seed": -1}, "-1"),
        ({"weights": {"colours": 1}}, "colours"),
        ({"weights": {"colors": -1}}, "-1"),
        ({"weights": {}}, "positive"),
        ({"split": "heldout", "weights": {"colors": 1}}, "heldout"),
    ]
    for arguments, message in bad:
        with pytest.raises(ValueError, match=message):
            Scenes(**arguments)
    with pytest.raises(ValueError, match="hexagon"):
        drawing.coverage("hexagon", 0.0, 0.0, 1.0)
