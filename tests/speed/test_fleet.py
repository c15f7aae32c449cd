"""Sweeps and the table: which programs are compiled, what is taken from the reports."""

import jax
import pytest

from t2i_jax import machines
from t2i_jax.errors import ConfigError
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
            {"none": 2, "products": 8, "outputs": 8, "full": 300},
            [1, 2, 4, 4, 8, 16, 16, 16, 32, 64],
        ),
        ({"none": 0, "products": 0, "outputs": 0, "full": 0}, [1, 1, 1, 1]),
    ],
)
def test_a_sweep_doubles_and_goes_on_where_the_last_policy_failed(monkeypatch, most, compiled):
    monkeypatch.setattr(machines, "devices", lambda topology: jax.devices())
    monkeypatch.setattr(compiler, "train", fitting(most))
    lines = []
    found = sweep.sweep(tiny.config(), "v5e-4", tell=lines.append)
    assert [row["batch_size"] // 8 for row in found["rows"]] == compiled
    assert found["largest"] == {
        policy: 8 * max(n for n in (1, 2, 4, 8, 16, 32, 64) if n <= count)
        for policy, count in most.items()
        if count
    }
    assert len(lines) == len(compiled)
    text = sweep.describe(found)
    assert ("products  64" in text) if found["largest"] else ("more devices" in text)


def test_rows_are_of_configs_and_machines_that_exist():
    names = [row.name for row in fleet.ROWS]
    assert len(set(names)) == len(names)
    for row in fleet.ROWS:
        config = fleet.changed(row)
        machines.parse(row.topology)
        assert config.data.image_size == 512 and row.config.removesuffix(".py")[8:] in row.name
    assert [row.topology for row in fleet.choose("sample")] == ["colab-v5e", "colab-v6e"]
    with pytest.raises(ConfigError, match="none of"):
        fleet.choose("v3-8")
    with pytest.raises(ConfigError, match="no regular expression"):
        fleet.choose("(")


def test_a_row_by_hand():
    first, second, *_ = fleet.ROWS
    travel = {
        "collective_bytes": 10 * GB,
        "collective_ratio": 1.25,
        "collectives": [
            {"kind": "all-gather", "bytes": 6 * GB, "asynchronous": True},
            {"kind": "all-gather", "bytes": 2 * GB, "asynchronous": False},
            {"kind": "all-reduce", "bytes": 2 * GB, "asynchronous": False},
        ],
        "flops_ratio": 1.0123,
    }
    suggested = {"suggestions": ["less", "more"]}
    reports = {second.name: report(needed=17 * GB, **suggested), first.name: report() | travel}
    head, _, one, two, _, why = fleet.table(reports).splitlines()
    assert one == (
        f"| {first.name} | 2 x 4 | 4 | 2.00 of 16.00 | 4.00 | 5.00 | 10.00 | 1.25 x | "
        "75% of gathers | 1.012 | 30 |"
    )
    assert f"| {second.name} | 2 x 4 | 4 | **does not fit**: 17.00 of 16.00 |" in two
    assert why == (
        f"{second.name} does not fit: beside 9.00 GB that are held, activations have too "
        "little room. "
        "What to try: less; more."
    )
    assert len(head.split("|")) == len(one.split("|")) == len(two.split("|"))


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
