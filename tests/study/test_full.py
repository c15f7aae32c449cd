"""The published runs: their cost by hand, their commands, their start."""

from pathlib import Path
import subprocess
import sys

import pytest

from t2i_jax import config as configs
from t2i_jax import flops
from t2i_jax.errors import ConfigError, UserError
from t2i_jax.study import commands, full
from t2i_jax.study import suite as suites
from t2i_jax.study.commands import Options
from t2i_jax.training.preemption import PreemptedError

ROOT = Path(__file__).resolve().parents[2]


def test_hours_by_hand():
    config = configs.load(str(ROOT / "configs/ablations/baseline.py"))
    # 6 N D of the DiT's matrices on 1,024 image tokens, 2 N D of the LLM's on 256 of text, and
    # what attention, the patches and the encoder of the VAE add.
    tokens, text, batch = 1024, 256, 512
    dit, llm = (
        18 * (2048 * 256 * (8 + 2 + 8) + 3 * 2048 * 16384),
        18 * (2048 * 256 * 18 + 3 * 2048 * 16384),
    )
    least = batch * (6 * dit * tokens + 2 * llm * text)
    work = sum(flops.train_step(config).values())
    assert least < work < 1.25 * least
    hours = full.device_hours(config, Options(chip="v4", mfu=0.5))
    assert hours == pytest.approx(500_000 * work / 275e12 / 0.5 / 3600)
    assert full.device_hours(config, Options(chip="v4", mfu=0.5, steps=5)) == pytest.approx(
        hours / 100_000
    )


def test_the_plan(capsys):
    options = Options(only=["ablations/no_temb", "fusion_2b_gemma2"], chip="v5p", devices=64)
    commands.study("paper_full", None, options)
    told = capsys.readouterr().out
    assert "64 x v5p, 459 TFLOP/s each, at an MFU of 40%" in told
    rows = [line.split() for line in told.splitlines()[2:6]]
    assert rows[1][:4] == ["ablations/no_temb", "1.98B", "500,000", "512"]
    assert rows[2][:3] == ["fusion_2b_gemma2", "2.02B", "1,000,000"]
    hours = [float(row[-2].replace(",", "")) for row in rows[1:]]
    assert hours[2] == pytest.approx(hours[0] + hours[1], abs=1)
    assert float(rows[3][-1]) == pytest.approx(hours[2] / 64 / 24, abs=0.06)
    where = "runs/paper_full/ablations/no_temb"
    assert (
        f"python launch/train.py --config=configs/ablations/no_temb.py --workdir={where}\n" in told
    )
    for name in ("geneval", "dpg", "mjhq"):
        assert f"launch/evaluate.py --checkpoint={where} --benchmark={name}" in told


def test_unknown_words():
    with pytest.raises(ConfigError, match="--chip=v9"):
        commands.study("paper_full", None, Options(chip="v9"))
    with pytest.raises(ConfigError, match=r"no row 'no_temb': ablations/baseline, "):
        commands.study("paper_full", None, Options(only=["no_temb"]))


def test_trainings_start_one_after_the_other(monkeypatch, capsys):
    started, statuses = [], [0, 0]

    def foreground(words):
        started.append(words)
        return statuses[len(started) - 1]

    monkeypatch.setattr(full.queue, "foreground", foreground)
    options = Options(only=["ablations/addition", "ablations/no_temb"], launch=True, steps=7)
    options = Options(**{**vars(options), "arguments": ["--coordinator=host:1"]})
    commands.study("paper_full", "gs://bucket/paper", options)
    for words, name in zip(started, ("addition", "no_temb"), strict=True):
        assert words == [
            sys.executable,
            str(ROOT / "launch/train.py"),
            f"--config={ROOT / f'configs/ablations/{name}.py'}",
            f"--workdir=gs://bucket/paper/ablations/{name}",
            "--config.train.steps=7",
            "--coordinator=host:1",
        ]
    for status, error in ((75, PreemptedError), (1, UserError)):
        started.clear()
        statuses[:] = [status]
        with pytest.raises(error, match="ablations/addition"):
            commands.study("paper_full", None, options)
        assert len(started) == 1


def test_the_command_line(tmp_path):
    def run(*flags):
        command = [sys.executable, str(ROOT / "launch/study.py"), *flags]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    for flags, message in (
        ([], "--suite=... must be given"),
        (["--suite=paper_full", "--seeds=1"], "--seeds does not go with --suite=paper_full"),
        (["--suite=paper_small", "--parallel=2", "--mfu=1"], "--mfu does not go with"),
        (["--results=nowhere.jsonl"], "nowhere.jsonl: no such file"),
    ):
        found = run(*flags)
        assert found.returncode in (1, 2) and message in found.stderr, (flags, found.stderr)
    assert not list(tmp_path.iterdir())


def test_wrong_options(tmp_path):
    for options, message in (
        (Options(seeds=["1", "1"]), "--seeds=1,1 must be different numbers"),
        (Options(seeds=["one"]), "--seeds=one must be"),
        (Options(out=str(tmp_path / "x.html")), "x.html must end in .md"),
    ):
        with pytest.raises(ConfigError, match=message):
            commands.study("paper_small", str(tmp_path / "suite"), options)
    with pytest.raises(ConfigError, match="needs a local directory"):
        commands.study("paper_small", "gs://bucket/suite", Options(out=str(tmp_path / "x.md")))
    assert not list(tmp_path.iterdir())


def test_suites_of_both_kinds_are_told_apart():
    assert commands.is_published("paper_full") and not commands.is_published("paper_small")
    assert isinstance(suites.load("paper_small"), suites.Suite)
