"""Two and four real processes are one: the same data, losses, pictures and checkpoints.

All runs have four devices in sum (two with 'tensor'). Sums over the batch have another order where
devices are in other processes, and float32 numbers differ by rounding: 1e-7 of their size after the
steps here, and 6e-6 where products are split over 'tensor', too. What is not summed is the same bit
by bit.
"""

import functools
import json
import shutil
import time

import jax
import numpy as np
from PIL import Image
import pytest

from t2i_jax import checkpoint, frozen, sharding
from t2i_jax.data import loader, sources
from t2i_jax.training import program
from t2i_jax.training.metrics import read_metrics
from tests import member
from tests.groups import LIMIT, RUN, Group, training

CLOSE = 2e-6  # relative; where only the batch is split
LAYOUTS = {"one": (1, 4), "two": (2, 2), "four": (4, 1)}  # processes, devices each


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Name -> working directory of a whole run.

    One and two processes each train the text side; the others begin with that of one.
    """
    parent = tmp_path_factory.mktemp("processes")
    tensor = {"tensor": (2, 1, "--config.mesh.tensor=2")}
    for name, layout in {**LAYOUTS, **tensor}.items():
        if name in ("four", "tensor"):
            for part in ("tokenizer", "llm"):
                shutil.copytree(parent / "one" / part, parent / name / part)
        training(parent / name, *layout, cache=parent / "programs").finish()
    return {name: parent / name for name in [*LAYOUTS, "tensor"]}


def metrics(workdir):
    """(what each line tells of, its numbers)"""
    lines = read_metrics(workdir)
    return [[*line] for line in lines], [[*line.values()] for line in lines]


def agree(one, other, close=CLOSE):
    (names, values), (their_names, theirs) = metrics(one), metrics(other)
    assert names == their_names and len(names) == RUN["train.steps"] * 3 // 2
    for line, their_line in zip(values, theirs, strict=True):
        np.testing.assert_allclose(line, their_line, rtol=close)


@pytest.mark.parametrize("name, close", [("two", CLOSE), ("four", CLOSE), ("tensor", 5e-5)])
def test_losses_norms_and_validation_are_those_of_one_process(runs, name, close):
    agree(runs["one"], runs[name], close)


@pytest.mark.parametrize("name", ["two", "four", "tensor"])
def test_pictures_are_those_of_one_process(runs, name):
    """But for a pixel here and there that rounds to the level beside."""
    pictures = [
        np.asarray(Image.open(runs[n] / "samples" / "step_0000004.png")).astype(int)
        for n in ("one", name)
    ]
    assert pictures[0].std() > 10
    difference = np.abs(pictures[0] - pictures[1])
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


@pytest.mark.parametrize("name", ["two", "four"])
def test_a_run_leaves_the_same_files(runs, name):
    def files(run):
        folders = run, run / "checkpoints", run / "profile" / "plugins" / "profile"
        return [sorted(p.name for p in folder.iterdir()) for folder in folders]

    assert files(runs[name]) == files(runs["one"])


def test_two_processes_train_the_same_tokenizer(runs):
    texts = [(runs[n] / "tokenizer" / "tokenizer.json").read_text() for n in ("one", "two")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_process_traces_the_same_step(runs, name):
    (folder,) = (runs[name] / "profile" / "plugins" / "profile").iterdir()
    assert folder.name == "steps_0000002_0000002"
    found = {p.name.partition(".")[0] for p in folder.iterdir()}
    assert found == {f"host_{i:04d}" for i in range(LAYOUTS[name][0])}


@pytest.fixture(scope="module")
def members(runs, tmp_path_factory):
    """Name -> what each process holds, by tests/member.py, of the checkpoint of two processes."""
    found = {}
    for name in ("two", "four"):
        count, devices = LAYOUTS[name]
        out = tmp_path_factory.mktemp(name)
        paths = [str(runs["two"]), str(out)]
        Group("tests/member.py", paths, count, devices, out / "log").finish()
        found[name] = [json.loads((out / f"{i}.json").read_text()) for i in range(count)]
    return found


@functools.cache
def whole_rows(workdir):
    """{step: {row: digest}} of the batches that one process makes."""
    with checkpoint.Checkpoints(workdir) as saved:
        config = saved.config(RUN["train.steps"])
    prompts = frozen.make_prompts(config, frozen.tokenizer_path(config, workdir), None)
    source, found = sources.make_source(config, "train"), {}
    with loader.Loader(source, prompts, config.data, member.SIZE, config.seed) as batches:
        for step in member.STEPS:
            x = batches.batch(step).arrays
            rows = range(member.SIZE)
            found[str(step)] = {str(r): member.digest(*(x[n][r] for n in sorted(x))) for r in rows}
    return found


HELD = {  # the rows of each process, by hand
    "two": {
        "fsdp": ["0123", "4567"],
        "data, fsdp": ["0123", "4567"],
        "fsdp, tensor": ["0123", "4567"],
        "tensor": ["01234567"] * 2,
        "crossed": ["0145", "2367"],
    },
    "four": {
        "fsdp": ["01", "23", "45", "67"],
        "data, fsdp": ["01", "23", "45", "67"],
        "fsdp, tensor": ["0123", "0123", "4567", "4567"],
        "tensor": ["01234567"] * 4,
        "crossed": ["01", "45", "23", "67"],
    },
}


@pytest.mark.parametrize("mesh", HELD["two"])
@pytest.mark.parametrize("name", HELD)
def test_the_data_are_the_same_bit_by_bit(runs, members, name, mesh):
    """Every process holds the rows that the mesh gives it, and they are those of one process."""
    whole = whole_rows(runs["two"])
    for found, held in zip(members[name], HELD[name][mesh], strict=True):
        wanted = {step: {row: rows[row] for row in held} for step, rows in whole.items()}
        assert found["rows"][mesh] == wanted
    firsts = [HELD[name][mesh].index(held) == i for i, held in enumerate(HELD[name][mesh])]
    assert [found["tells"][mesh] for found in members[name]] == firsts


@pytest.mark.parametrize("name", ["two", "four"])
def test_a_checkpoint_of_two_processes_is_read_bit_by_bit(runs, members, name):
    """Each part that a process holds, against the whole read on one device."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with checkpoint.Checkpoints(runs["two"]) as saved:
        config = saved.config(RUN["train.steps"])
        whole = saved.restore(RUN["train.steps"], program.abstract_state(config, mesh)[0])
    leaves = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(whole)}
    split = 0
    for path, x in leaves.items():
        x, covered = np.asarray(x), np.zeros(x.shape, bool)
        for found in members[name]:
            for bounds, digest in found["state"][path]:
                part = tuple(slice(*b) for b in bounds)
                assert member.digest(x[part]) == digest, path
                covered[part] = True
                split += covered[part].size < x.size
        assert covered.all(), path
    assert split > 20 and all(found["state"].keys() == leaves.keys() for found in members[name])


def test_what_fails_on_one_process_is_told_by_all(members):
    for found in members.values():
        *others, last = [f["told"] for f in found]
        assert last == "raised no such shard"
        assert all(f"process {len(others)} (" in told for told in others)
        assert all("no such shard" in told for told in others)


@pytest.mark.parametrize("name", ["two", "four"])
def test_features_are_made_by_the_process_that_holds_the_row(members, name):
    """Of eleven items in batches of eight; the bad one is in the first row of the second batch."""
    for held, found in zip(HELD[name]["fsdp"], members[name], strict=True):
        features, prepared, told = found["features"]
        assert features == [3.0 * i for i in range(11)]
        assert prepared == [i for i in range(11) if str(i % 8) in held]
        assert "a bad picture" in told and told.startswith("Stopped") == ("0" not in held)


def test_a_run_of_two_processes_is_resumed_by_one(runs, tmp_path):
    workdir = tmp_path / "resumed"
    shutil.copytree(runs["two"], workdir)
    shutil.rmtree(workdir / "checkpoints" / "4")
    (workdir / "samples" / "step_0000004.png").unlink()
    said = training(workdir, *LAYOUTS["one"], cache=runs["two"].parent / "programs").finish()
    assert "resumed at step 2 of 4" in said[0]
    agree(runs["two"], workdir)
    assert (workdir / "checkpoints" / "4").exists()
    assert (workdir / "samples" / "step_0000004.png").exists()


def test_a_missing_process_is_named_by_all_others(tmp_path):
    limit = 40  # seconds, which all have to start in
    began = time.monotonic()
    group = training(tmp_path / "run", 4, 1, absent=[1, 3], timeout=limit)
    assert group.statuses() == {0: 1, 2: 1}
    assert time.monotonic() - began < LIMIT
    for text in group.outputs().values():
        assert text.count("\n") == 1  # and nothing else
        assert "2 of 4 processes did not start within 40 s: 1, 3. There are: 0 (" in text
    assert not (tmp_path / "run").exists()


def test_a_process_with_another_config_is_named_by_all(tmp_path):
    own = {1: ["--config.train.batch_size=16", "--config.seed=3"]}
    group = training(tmp_path / "run", 2, 1, own=own)
    assert group.statuses() == {0: 2, 1: 2}
    for text in group.outputs().values():
        assert "seed = 3, not 42; train.batch_size = 16, not 8" in text
        assert "process 1 (" in text and "Traceback" not in text
    assert not (tmp_path / "run").exists()
