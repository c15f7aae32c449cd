"""Verdicts: the words that findings earn a claim; and the controls, when they come out wrong."""

import math
import random

import pytest

from t2i_jax.data.scenes import Scenes
from t2i_jax.evaluation import scenes
from t2i_jax.study import claims, controls
from t2i_jax.study.claims import AGREES, CONTRADICTS, UNDECIDED, UNTESTED
from t2i_jax.study.findings import Findings
from tests.study import made


def judged(expects, *, here, there, measure="score"):
    """The verdict on one claim of rows whose seeds have these values."""
    claim = {"claim": "c", "where": "w", "rows": ["other", "first"]}
    claim |= {"measure": measure, "expects": expects}
    # A third row that gives the spread its size.
    rows = {"first": there, "other": here, "third": [0.30, 0.34, 0.26]}
    (verdict,) = claims.judge(Findings(made.entries(rows, claims=[claim])))
    return verdict


LOW, SAME, HIGH = [0.10, 0.14, 0.12], [0.40, 0.60, 0.53], [0.80, 0.84, 0.82]


@pytest.mark.parametrize(
    ("expects", "here", "word"),
    [
        ("more", HIGH, AGREES),
        ("more", LOW, CONTRADICTS),
        ("more", SAME, UNDECIDED),
        ("less", LOW, AGREES),
        ("less", HIGH, CONTRADICTS),
        ("not less", HIGH, AGREES),
        ("not less", LOW, CONTRADICTS),
        ("not more", LOW, AGREES),
        ("not more", HIGH, CONTRADICTS),
        # An interval as wide as these cannot rule out a loss of the margin.
        ("not less", SAME, UNDECIDED),
    ],
)
def test_words(expects, here, word):
    assert judged(expects, here=here, there=[0.50, 0.52, 0.51]).word == word


def test_no_worse_agrees_only_where_a_loss_can_be_ruled_out():
    tight = [0.300, 0.301, 0.302]  # differences that hardly change from seed to seed
    claim = {"claim": "c", "where": "w", "rows": ["other", "first"]}
    claim |= {"measure": "score", "expects": "not less"}
    found = made.entries({"first": tight, "other": tight, "third": tight}, claims=[claim])
    found[-1]["score"] += 0.001
    (verdict,) = claims.judge(Findings(found))
    assert verdict.word == AGREES and verdict.seen.value == 0


def test_one_seed_decides_nothing():
    assert judged("more", here=[0.9], there=[0.1]).word == UNTESTED


def timed(ratio, rounds=15, **change):
    """The verdict on 'less' of a row that takes `ratio` times as long as the first."""
    claim = {"claim": "c", "where": "w", "rows": ["other", "first"]}
    claim |= {"measure": "sample", "expects": "less"}
    found = made.entries({"first": [0.5] * 3, "other": [0.5] * 3}, claims=[claim])
    other = made.speed("other", ratio, spread=0.02) | {"rounds": rounds}
    other["sample"] |= change
    (verdict,) = claims.judge(Findings([*found, made.speed("first", 1.0, spread=0.0), other]))
    return verdict


def test_times_are_compared_by_their_rounds():
    for ratio, word in ((0.8, AGREES), (1.3, CONTRADICTS), (1.0, UNDECIDED)):
        found = timed(ratio)
        assert (found.word, found.seen.value) == (word, pytest.approx(math.log(ratio)))
    assert timed(0.8).certain == "clearly"
    assert timed(0.8, rounds=5).word == UNTESTED


def test_an_interval_of_times_is_not_made_symmetric():
    """All rounds but few were slower: the lower end is what counts."""
    found = timed(1.02, low=1.015, high=1.08)
    assert found.word == CONTRADICTS
    assert found.seen.interval == pytest.approx((math.log(1.015), math.log(1.08)))


def test_a_claim_that_this_world_cannot_test_says_why():
    claim = {"claim": "c", "where": "w", "why": "no reason"}
    (verdict,) = claims.judge(Findings(made.entries({"first": [0.1]}, claims=[claim])))
    assert verdict == (claim, None, UNTESTED, "")


# --- controls ---


def passed(rows, **options):
    found = Findings(made.entries(rows, chance=(20, 1000), **options))
    return [control.passed for control in controls.check(found)]


GOOD = {"first": [0.5, 0.6, 0.55], "llm-random": [0.4, 0.5, 0.45], "shuffled": [0.02, 0.01, 0.02]}


def test_controls_that_come_out_right():
    assert passed(GOOD) == [True] * 5  # chance, others' prompts, null, the row, the random LLM


def test_a_random_language_model_is_compared_with_its_like_alone():
    rows = {"first": [0.1, 0.12, 0.11], "llm-random": [0.5, 0.52, 0.51]}
    assert passed(rows) == [True, True, True, False]
    found = made.entries(rows, chance=(20, 1000))
    found[0]["rows"][0]["diff"] = {"dit.positions": "2d-rope"}  # differs in more than the LLM
    assert len(controls.check(Findings(found))) == 3
    one = {name: scores[:1] for name, scores in rows.items()}
    assert passed(one) == [True] * 3  # a single seed cannot tell


@pytest.mark.parametrize(
    ("change", "which"),
    [
        ({"shuffled_prompts": 0.2}, 1),
        ({"null": 0.2}, 2),
        ({"null": {"llm-random": 0.2}}, 2),  # one row alone
        ({"rows": GOOD | {"shuffled": [0.2, 0.3, 0.25]}}, 3),
        ({"rows": GOOD | {"llm-random": [0.9, 0.95, 0.92]}}, 4),
    ],
)
def test_a_control_that_comes_out_wrong_is_told(change, which):
    change = dict(change)
    found = passed(change.pop("rows", GOOD), **change)
    assert found == [i != which for i in range(5)]


def test_chance_is_that_of_independent_pictures_and_prompts():
    """Another world's pictures against prompts drawn at random, within four deviations."""
    right, count = controls.chance(24, seed=5)
    world, draw = Scenes(24, "heldout", seed=9, length=6000), random.Random(0)
    pairs = [(draw.randrange(6000), draw.randrange(6000)) for _ in range(600)]
    seen = [scenes.check(world[i]["image"], world.prompt(j)) for i, j in pairs if i != j]
    share = sum(seen) / len(seen)
    assert abs(right / count - share) < 4 * math.sqrt(0.02 * 0.98 * (1 / count + 1 / len(seen)))
    assert 0.005 < right / count < 0.04
