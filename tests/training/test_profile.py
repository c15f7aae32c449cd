"""Which steps are traced, and what is left of them."""

import contextlib
import gzip
import json

from ml_collections import ConfigDict
import pytest

from t2i_jax.training.profile import Profile


@pytest.fixture
def events(monkeypatch):
    """What happens, in order; the profiler itself is not asked."""
    happened = []

    def start(folder, **options):
        happened.append("start")

    monkeypatch.setattr("jax.profiler.start_trace", start)
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: happened.append("stop"))
    return happened


def run(events, tmp_path, numbers, *, start, steps, compiles=()):
    """Steps `numbers` of a run, of which some compile."""

    @contextlib.contextmanager
    def apart(what):
        assert what == "profile"
        events.append("(")
        yield
        events.append(")")

    with Profile(ConfigDict({"start": start, "steps": steps}), tmp_path, apart) as profile:
        for number in numbers:
            with profile.step(number, number in compiles):
                events.append(number)


def test_the_steps_after_the_first_ones_of_a_start(events, tmp_path, capsys):
    run(events, tmp_path, range(101, 108), start=2, steps=3, compiles=[101])
    assert events == [101, 102, "(", "start", ")", 103, 104, 105, "(", "stop", ")", 106, 107]
    (folder,) = (tmp_path / "profile" / "plugins" / "profile").iterdir()
    assert folder.name == "steps_0000103_0000105"
    assert f"steps 103 to 105 are traced in {folder}" in capsys.readouterr().out


def test_a_step_that_compiles_is_in_no_trace(events, tmp_path):
    run(events, tmp_path, range(1, 9), start=1, steps=4, compiles=[1, 2, 5])
    only = [event for event in events if event not in ("(", ")")]
    assert only == [1, 2, "start", 3, 4, "stop", 5, "start", 6, 7, "stop", 8]
    folders = sorted(p.name for p in (tmp_path / "profile" / "plugins" / "profile").iterdir())
    assert folders == ["steps_0000003_0000004", "steps_0000006_0000007"]


def test_without_steps_nothing_is_traced(events, tmp_path, capsys):
    run(events, tmp_path, range(1, 4), start=1, steps=0)
    assert events == [1, 2, 3] and not capsys.readouterr().out
    assert not (tmp_path / "profile").exists()


def test_a_run_that_ends_first_keeps_what_was_traced_and_says_so(events, tmp_path, capsys):
    run(events, tmp_path, range(1, 4), start=1, steps=9, compiles=[1])
    assert "steps 2 to 3 are traced" in (said := capsys.readouterr().out)
    assert "the run ended 7 steps before profile.steps were traced" in said


def test_a_run_that_fails_waits_for_nothing(events, tmp_path):
    with pytest.raises(RuntimeError, match="no"):
        run(events, tmp_path, fails(), start=1, steps=9, compiles=[1])
    assert events == [1, "(", "start", ")", 2, "stop"]


def fails():
    yield from (1, 2)
    raise RuntimeError("no")


def test_the_trace_of_a_run_has_its_steps_and_data(trained):
    folder = trained / "profile" / "plugins" / "profile" / "steps_0000002_0000003"
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["host_0000.perfetto.json.gz", "host_0000.xplane.pb"]
    assert b"train" in (folder / names[1]).read_bytes()
    with gzip.open(folder / names[0]) as file:
        events = json.load(file)["traceEvents"]
    steps = [event["args"]["step_num"] for event in events if event.get("name") == "train"]
    assert sorted(steps) == ["2", "3"]
    assert any(event.get("name") == "waiting for data" for event in events)
