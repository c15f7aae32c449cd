"""Suites: what their files may say, what runs they are, what decides a result."""

from pathlib import Path

import pytest

from configs.suites import paper_full, paper_small
from t2i_jax import config as configs
from t2i_jax.errors import ConfigError
from t2i_jax.study import parts, suite

HEAD = """
from configs.suites import paper_small


def get_config():
    return paper_small.get_config()


"""


def write(tmp_path, rest):
    file = tmp_path / "mine.py"
    file.write_text(HEAD + rest)
    return str(file)


@pytest.fixture(scope="module")
def small():
    return suite.load("paper_small")


def test_every_design_of_the_paper_is_a_row_of_the_small_suite(small):
    """Each full-size ablation has a row that changes the same keys, to the same words."""
    counterparts = {
        "cross_attention": "cross-attention",
        "dit_self_attention": "dit-self-attention",
        "dit_cross_attention": "dit-cross-attention",
        "adaln_single": "adaln-single",
        "addition": "addition",
        "no_temb": "no-temb",
        "rope_1d": "1d-rope",
        "rope_2d": "2d-rope",
        "m_rope": "m-rope",
        "middle": "middle",
        "mixture": "mixture",
    }
    folder = Path(paper_small.__file__).parent.parent / "ablations"
    full = {file.stem: configs.flat(configs.load(str(file))) for file in folder.glob("*.py")}
    rows = {run.row.name: configs.flat(run.config) for run in small.runs([0])}
    words = (
        "dit.attention",
        "dit.conditioning",
        "dit.positions",
        "memory.source",
        "dit.prediction",
    )
    for theirs, ours in counterparts.items():
        for key in words[:-1]:
            assert full[theirs][key] == rows[ours][key], (theirs, key)
    sizes = {"width-80": "hidden_1280", "width-96": "hidden_1536", "width-112": "hidden_1792"}
    for ours, theirs in sizes.items():
        assert rows[ours]["dit.width"] / 128 == full[theirs]["dit.width"] / 2048
    for number, row in ((2, "layers-2"), (3, "layers-3")):
        assert rows[row]["dit.num_layers"] == number < rows[row]["llm.num_layers"] + 1
    assert bool(rows["clip-mod"]["dit.pooled_width"]) and full["clip_mod"]["dit.pooled_width"]
    # Without a counterpart at this size: what was done to the published language models.
    assert set(full) - set(counterparts) - set(sizes.values()) == {
        *("baseline", "clip_mod", "layers_10", "layers_14"),
        *("gemma_2", "gemma_it", "gemma_it_instruction", "paligemma"),
    }


def test_a_row_differs_from_the_first_in_what_it_says(small):
    base, *others = small.runs([3])
    for run in others:
        here, there = configs.flat(run.config), configs.flat(base.config)
        found = {key for key in here if here[key] != there[key]} - {"name"}
        made = {"weights.llm", "weights.tokenizer", "weights.clip"}
        assert found - made == set(run.row.diff) - {k for k in run.row.diff if here[k] == there[k]}


def test_rows_share_the_parts_that_they_do_not_change(small):
    by_row = {run.row.name: [part.name for part in run.needs] for run in small.runs([0, 1])}
    base = by_row["baseline"]
    assert len(base) == 1 and base[0].startswith("llm-")
    for row in ("layers-2", "middle", "width-80", "shuffled-captions", "mixture"):
        assert by_row[row] == base
    assert by_row["clip-mod"][0] == base[0] and by_row["clip-mod"][1].startswith("clip-")
    assert len({*by_row["llm-longer"], *by_row["llm-random"], *base}) == 3
    everything = parts.unique(part for run in small.runs([0, 1]) for part in run.needs)
    assert len(everything) == 4
    (maker,) = [part.config for part in everything if part.name == base[0]]
    assert maker.llm.num_layers == 4 and not maker.weights.llm


@pytest.mark.parametrize(
    "diff", [{"train.dtype": "bfloat16"}, {"llm.width": 64}, {"pretrain.learning_rate": 1e-3}]
)
def test_what_a_language_model_is_made_with_is_in_its_name(tmp_path, diff):
    one, other = suite.load(write(tmp_path, f'ROWS = [("a", {{}}), ("b", {diff})]')).runs([0])
    assert one.needs[0].name != other.needs[0].name


def test_a_clip_is_made_of_a_built_in_world_alone(tmp_path):
    row = "{**paper_small.CLIP, 'data.source': 'folder', 'data.path': 'x'}"
    with pytest.raises(ConfigError, match=r"weights.clip = '': .* data.source = 'folder'"):
        suite.load(write(tmp_path, f'ROWS = [("a", {row})]')).runs([0])


def test_a_result_is_decided_by_everything_but_the_name(small, tmp_path):
    file = write(tmp_path, 'ROWS = [("one", {}), ("two", {}), ("three", {"dit.width": 80})]')
    one, two, three, again = suite.load(file).runs([0])[:3] + suite.load(file).runs([1])[:1]
    assert one.digest == two.digest and one.folder != two.folder
    assert len({one.digest, three.digest, again.digest}) == 3
    assert small.runs([0])[0].digest == one.digest
    assert small.shortened(500).runs([0])[0].digest != one.digest


def test_a_shortened_suite_looks_as_often(small):
    short = small.shortened(100).base
    assert short.train.steps == 100
    assert short.evaluation.every * 4 == 100 == short.checkpoint.every * 2
    assert round(100 / short.validation.every) == 8
    assert small.shortened(None) is small


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("ROWS = []", "defines no ROWS"),
        ('ROWS = ["baseline"]', "is not (name, {key: value})"),
        ('ROWS = [("a", {}), ("a", {})]', "two rows are called 'a'"),
        ('ROWS = [("a", {"train.steps": 5})]', "row 'a' changes train.steps"),
        ('ROWS = [("a", {"sampling.guidance": 1.0})]', "changes sampling.guidance"),
        ('ROWS = [("a", {})]\nGROUPS = {"x": ["b"]}', "GROUPS names 'b'"),
        ('ROWS = [("a", {})]\nCLAIMS = [{"claim": "c"}]', "must have claim, expects"),
        (
            'ROWS = [("a", {})]\nCLAIMS = [{"claim": "c", "where": "w", "rows": ("a", "b"),'
            ' "measure": "score", "expects": "more"}]',
            "is of two rows",
        ),
    ],
)
def test_files_that_cannot_be(tmp_path, rest, message):
    with pytest.raises(ConfigError) as caught:
        suite.load(write(tmp_path, rest))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("diff", "message"),
    [
        ({"dit.widht": 64}, "dit.widht is not a key of configs/base.py. Did you mean dit.width?"),
        ({"dit.width": "64"}, "dit.width"),
        ({"dit.attention": "both"}, "dit.attention = 'both' is unknown"),
    ],
)
def test_rows_that_cannot_be(tmp_path, diff, message):
    with pytest.raises(ConfigError) as caught:
        suite.load(write(tmp_path, f'ROWS = [("odd", {diff})]')).runs([0])
    assert "'odd'" in str(caught.value) and message in str(caught.value)


def test_names(small):
    assert [row.name for row in small.only(["m-rope", "baseline"]).rows] == ["baseline", "m-rope"]
    with pytest.raises(ConfigError, match=r"no row 'm_rope'.*Did you mean m-rope"):
        small.only(["m_rope"])
    with pytest.raises(ConfigError, match=r"--suite=paper-small.*Did you mean paper_small"):
        suite.load("paper-small")


def test_the_full_suite_is_what_was_published():
    full = suite.load("paper_full")
    folder = Path(paper_full.__file__).parent.parent
    ablations = {f"ablations/{file.stem}" for file in (folder / "ablations").glob("*.py")}
    ours = {"ablations/middle", "ablations/mixture"}
    assert set(full.files) == ablations - ours | {"fusion_2b_gemma2"}
    assert all(file.is_file() for file in full.files.values())
