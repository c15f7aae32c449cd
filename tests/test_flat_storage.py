"""A working directory on gs://: nothing is renamed or appended to, and there are no folders."""

from etils import epath
import jax
import pytest

from t2i_jax import checkpoint, frozen, jsonlines
from t2i_jax.data.tokenizer import Tokenizer
from t2i_jax.errors import MissingError
from t2i_jax.pipeline import Pipeline
from t2i_jax.training import loop
from t2i_jax.training.history import History, goodput
from t2i_jax.training.metrics import MetricWriter, read_metrics
from tests import flat_storage, tiny
from tests.clock import Clock
from tests.test_checkpoint import host_state, like, on_devices

RUN = f"{flat_storage.URL}/run"
SIZES = (1, 2, 1)
COMMIT = "commit_success.txt"  # orbax writes it last


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The folder that is the bucket; nothing may be written beside it."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "cloud"
    flat_storage.provide(root, monkeypatch)
    yield root / "bucket"
    assert [path.name for path in tmp_path.iterdir()] == ["cloud"]


def saved_steps(*steps):
    with checkpoint.Checkpoints(RUN, keep=3) as saved:
        for step in steps:
            saved.save(step, on_devices(host_state(step), SIZES), tiny.config(seed=step))


def restored():
    """The step of the newest good checkpoint, whose state is checked."""
    with checkpoint.Checkpoints(RUN, keep=3) as saved:
        state = saved.restore_newest(like(host_state(), SIZES))
        step = saved.steps()[-1]
    tiny.equal(state, host_state(step))
    return step


def test_a_run_goes_on_as_on_a_disk(bucket, trained, capsys, monkeypatch):
    """Killed when its last checkpoint had everything but its end."""
    config = tiny.config(**tiny.WATCHED | {"profile__steps": 0, "sampling__every": 0})
    save, stored = checkpoint.Checkpoints.save, []

    def noting(self, step, *args):
        stored.append([entry["step"] for entry in read_metrics(RUN)])
        save(self, step, *args)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", noting)
    loop.train(config, RUN)
    (bucket / "run" / "checkpoints" / "4" / COMMIT).unlink()
    loop.train(config, RUN)
    assert "resumed at step 2 of 4" in capsys.readouterr().out
    assert stored == [[1, 2, 2], [1, 2, 2, 3, 4, 4], [1, 2, 2, 3, 4, 4]]  # before it is saved
    texts = [(w / "metrics.jsonl").read_text() for w in (trained, bucket / "run")]
    assert texts[0] == texts[1]
    pipelines = Pipeline.load(trained), Pipeline.load(RUN)
    tiny.equal(*(jax.device_get(p.params) for p in pipelines))


def test_one_that_was_not_finished_is_told_and_deleted(bucket, capsys):
    saved_steps(3, 5)
    (bucket / "run" / "checkpoints" / "5" / COMMIT).unlink()
    assert checkpoint.find(RUN)[1] == 3
    with pytest.raises(MissingError, match="checkpoints/5 was never finished"):
        checkpoint.find(f"{RUN}/checkpoints/5")
    assert restored() == 3
    assert f"{RUN}/checkpoints/5 was never finished, and is deleted" in capsys.readouterr().err
    assert [p.name for p in epath.Path(f"{RUN}/checkpoints").iterdir()] == ["3"]


def test_a_damaged_one_is_put_aside(bucket, capsys):
    saved_steps(3, 5)
    for file in (bucket / "run" / "checkpoints" / "5" / "ema").rglob("d/*"):
        file.write_bytes(b"")
    assert restored() == 3
    aside = f"{RUN}/damaged_checkpoints/5"
    assert f"checkpoint 5 is now {aside}; going on from checkpoint 3" in capsys.readouterr().err
    there = bucket / "run" / "damaged_checkpoints"
    assert (there / "5.txt").read_text().startswith("ema: ")
    assert (there / "5" / COMMIT).exists() and (there / "5" / "params").exists()
    assert restored() == 3


def test_a_language_model_that_was_not_finished_is_made_again(bucket):
    path, tree = frozen.llm_path(RUN), on_devices(host_state()).params
    assert not checkpoint.has_tree(path)
    checkpoint.save_tree(path, jax.tree.map(lambda x: 2 * x, tree))
    assert checkpoint.has_tree(path)
    (bucket / "run" / "llm" / COMMIT).unlink()
    assert not checkpoint.has_tree(path)
    checkpoint.save_tree(path, tree)
    assert checkpoint.has_tree(path)
    tiny.equal(checkpoint.load_tree(path, like(host_state(), SIZES).params), host_state().params)


def test_a_tokenizer_that_was_not_finished_is_made_again(bucket, trained, monkeypatch):
    tokenizer, path = Tokenizer.load(trained / "tokenizer"), f"{RUN}/tokenizer"
    write = epath.Path.write_text

    def killed(self, *args):
        if self.name.startswith("tokenizer.json"):
            raise KeyboardInterrupt
        return write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(type(epath.Path(RUN)), "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            tokenizer.save(path)
    assert epath.Path(path).exists() and not Tokenizer.is_saved(path)
    tokenizer.save(path)
    assert Tokenizer.is_saved(path)
    assert Tokenizer.load(path).rows(["a red ring"]) == tokenizer.rows(["a red ring"])
    names = [sorted(p.name for p in (w / "tokenizer").iterdir()) for w in (trained, bucket / "run")]
    assert names[0] == names[1]


def test_the_history_of_a_young_run_is_there(bucket):
    clock = Clock()
    history = History(RUN, clock)
    clock.now += 10
    history.ready(0)
    clock.now += 30
    assert goodput(RUN, clock.now) == history.goodput() == pytest.approx(30 / 40)
    history.saved(7)
    history = History(RUN, clock)  # killed; it knows what was before it
    clock.now += 20
    history.ready(7)
    assert goodput(RUN, clock.now) == history.goodput() == pytest.approx(30 / 60)


def test_what_a_checkpoint_stands_on_is_stored_before_it(bucket):
    writer = MetricWriter(RUN)
    for step in (1, 2, 3):
        writer.scalars(step, {"loss": 1.0})
        writer.speed(step, {"mfu": 0.5})
        if step == 2:
            writer.flush()  # and step 2 is saved; killed in step 3
    for name in ("metrics.jsonl", "speed.jsonl"):
        assert [e["step"] for e in jsonlines.read(f"{RUN}/{name}")] == [1, 2]
        assert [e["step"] for e in jsonlines.JsonLines(f"{RUN}/{name}", 1).kept] == [1]
