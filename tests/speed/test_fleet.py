"""Sweeps and the table: which programs are compiled, what is taken from the reports."""

import json
import pathlib

import jax
import pytest

from t2i_jax import machines
from t2i_jax.errors import ConfigError
from t2i_jax.models.layers import REMAT_POLICIES
from t2i_jax.speed import compile as compiler
from t2i_jax.speed import fleet, sweep
from tests import tiny

GB = 10**9


def report(name="x", needed=2 * GB, there=16 * GB, **changes):
    return {
        "config": name,
        "mesh": {"data": 2, "fsdp": 4, "tensor": 1},
        "batch_size": 32,
        "fits": needed <= there,
        "bytes_needed": needed,
        "bytes_there": there,
        "memory": {"parameters": GB, "EMA": GB, "optimiser": 2 * GB, "frozen": 5 * GB},
        "seconds": {"trace": 1.0, "compile": 20.0, "compile encoder": 9.0},
        "what": "train",
        "peaks": {"train": needed, "encoder": 1.5 * GB},
        "made_with": {"commit": "abc", "jax": "1", "libtpu": "2"},
        **changes,
    }


def fitting(most):
    """`compile.train` of a machine on which so many rows a device fit, by policy."""

    def train(config, topology, *, latents):
        each = config.train.batch_size // 8
        fits = each <= most[config.dit.remat]
        return report(needed=GB, fits=fits, remat=config.dit.remat) | {
            "batch_size": config.train.batch_size
        }

    return train


@pytest.mark.parametrize(
    "most, compiled",
    [
        (
            {"none": 2, "products": 11, "outputs": 11, "full": 300},
            [1, 2, 4, 3, 2, 4, 8, 16, 12, 10, 11, 11, 22, 16, 13, 12, 11, 22, 44, 64],
        ),
        ({"none": 0, "products": 0, "outputs": 0, "full": 1}, [1, 1, 1, 1, 2]),
    ],
)
def test_a_sweep_doubles_halves_and_goes_on_where_the_last_policy_ended(
    monkeypatch, most, compiled
):
    monkeypatch.setattr(machines, "devices", lambda topology: jax.devices())
    monkeypatch.setattr(compiler, "train", fitting(most))
    lines = []
    found = sweep.sweep(tiny.config(), "v5e-4", tell=lines.append)
    assert [row["batch_size"] // 8 for row in found["rows"]] == compiled
    assert found["largest"] == {
        policy: 8 * min(count, sweep.MOST) for policy, count in most.items() if count
    }
    assert len(lines) == len(compiled)
    text = sweep.describe(found)
    assert ("full      at least 512" in text) == (most["full"] > sweep.MOST)
    assert ("products  88" in text) == (most["products"] == 11)


def test_a_sweep_in_which_nothing_fits(monkeypatch):
    monkeypatch.setattr(machines, "devices", lambda topology: jax.devices())
    monkeypatch.setattr(compiler, "train", fitting(dict.fromkeys(REMAT_POLICIES, 0)))
    found = sweep.sweep(tiny.config(), "v5e-4", tell=lambda line: None)
    assert found["largest"] == {} and "more devices" in sweep.describe(found)


def test_rows_are_of_configs_and_machines_that_exist():
    names = [row.name for row in fleet.ROWS]
    assert len(set(names)) == len(names)
    for row in fleet.ROWS:
        config = fleet.changed(row)
        machines.parse(row.topology)
        assert config.data.image_size == 512 and row.config.removesuffix(".py")[8:] in row.name
    drawn = [row.topology for row in fleet.choose("^sample")]
    assert drawn == ["colab-v5e"] * 2 + ["colab-v6e"] * 2
    with pytest.raises(ConfigError, match="none of"):
        fleet.choose("v3-8")
    with pytest.raises(ConfigError, match="no regular expression"):
        fleet.choose("(")


def test_a_row_by_hand():
    first, second, *_ = fleet.ROWS
    travel = {
        "collective_bytes": 11 * GB,
        "collective_ratio": 1.25,
        "ideal_bytes": {"all-gather": 7 * GB, "all-reduce": GB},
        "collectives": [
            {"kind": "all-gather", "bytes": 6 * GB, "asynchronous": True},
            {"kind": "all-gather", "bytes": 2 * GB, "asynchronous": False},
            {"kind": "all-reduce", "bytes": 2 * GB, "asynchronous": False},
            {"kind": "collective-permute", "bytes": GB, "asynchronous": True},
        ],
        "flops_ratio": 1.0123,
    }
    suggested = {"suggestions": ["less", "more"]}
    reports = {second.name: report(needed=17 * GB, **suggested), first.name: report() | travel}
    head, _, one, two, _, why, _, made = fleet.table(reports).splitlines()
    assert one == (
        f"| {first.name} | 2 x 4 | 4 | 2.00 of 16.00 | 1.50 | 4.00 | 5.00 | 8.00 (7.00) | "
        "0.00 (0.00) | 2.00 (1.00) | 1.00 | 1.25 x | 75% of gathers | 1.012 | 21 | 9 |"
    )
    assert f"| {second.name} | 2 x 4 | 4 | **does not fit**: 17.00 of 16.00 |" in two
    assert why == (
        f"{second.name} does not fit: beside 9.00 GB that are held, activations have too "
        "little room. "
        "What to try: less; more."
    )
    assert made == "Made with commit abc, jax 1, libtpu 2."
    assert len(head.split("|")) == len(one.split("|")) == len(two.split("|"))


# --- the committed table ---

DOCS = pathlib.Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def committed():
    return json.loads((DOCS / "tpu.json").read_text())


def test_the_committed_table_has_every_row_and_is_what_the_page_shows(committed):
    assert list(committed) == [row.name for row in fleet.ROWS]
    page = (DOCS / "tpu.md").read_text()
    inside = page[page.index(fleet.BEGIN) + len(fleet.BEGIN) : page.index(fleet.END)]
    assert inside.strip() == fleet.table(committed)


@pytest.mark.parametrize("pod", fleet.PODS)
def test_what_is_trained_on_pods_fits_them(committed, pod):
    rows = [row for row in fleet.ROWS if row.topology == pod and row.what == "train"]
    assert len(rows) >= 4
    for row in rows:
        assert committed[row.name]["fits"], row.name


def test_the_flagship_on_the_papers_pod_receives_what_it_must(committed):
    report = committed["train fusion_2b on v4-256"]
    assert report["batch_size"] == 512 and report["collective_ratio"] < 1.15
    kinds = {row["kind"] for row in report["collectives"] if row["bytes"] > 1e6}
    assert "all-to-all" not in kinds
    assert abs(report["flops_ratio"] - 1) < 0.03


@pytest.mark.parametrize("chip", fleet.CHIPS)
def test_one_chip_draws_and_fine_tunes_but_does_not_train_the_whole(committed, chip):
    for row in (row for row in fleet.ROWS if row.topology == chip):
        whole = row.config == "configs/fusion_2b.py" and row.what == "train"
        report = committed[row.name]
        if row.changes != (("dit.remat", "none"),):
            assert report["fits"] != whole, row.name
        if whole:
            assert any("lora.rank" in text for text in report["suggestions"])
            assert any("more devices" in text for text in report["suggestions"])


def test_the_table_goes_between_the_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{fleet.BEGIN}\nold\n{fleet.END}\nafter\n")
    fleet.rewrite(page, "| new |")
    fleet.rewrite(page, "| new |")
    assert page.read_text() == f"before\n{fleet.BEGIN}\n\n| new |\n\n{fleet.END}\nafter\n"
    page.write_text("nothing")
    with pytest.raises(ConfigError, match="no such file"):
        fleet.rewrite(tmp_path / "none.md", "| new |")
    with pytest.raises(ConfigError, match="must have one line"):
        fleet.rewrite(page, "| new |")
