"""launch/: real processes, in an empty directory, with nothing of this project on their path."""

import json
import os
import pathlib
import subprocess
import sys

from PIL import Image
import pytest

from t2i_jax import config as configs
from tests import tiny

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS, LAUNCH = ROOT / "configs", ROOT / "launch"
# Runs a script as an interpreter would into which this project was never installed.
BARE = f"""
import runpy, sys
sys.path[:] = [path for path in sys.path if path not in ("", {str(ROOT)!r})]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
try:
    import t2i_jax
    sys.exit("t2i_jax is still installed")
except ImportError:
    del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Starts a script in an empty directory; returns what waits for (status, out, err, dir)."""
    started = []

    def start(script, *flags):
        directory = tmp_path_factory.mktemp("cwd") if script.is_absolute() else ROOT
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        process = subprocess.Popen(
            [sys.executable, "-c", BARE, script, *flags],
            cwd=directory,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)

        def wait():
            out, err = process.communicate(timeout=200)
            return process.returncode, out, err, directory

        return wait

    yield start
    for process in started:
        process.kill()


@pytest.fixture(scope="module")
def runs(launch, trained):
    """All processes of this module, two at a time."""
    scenes = f"--config={CONFIGS / 'scenes.py'}"
    mesh = ("--config.mesh.data=4", "--config.mesh.fsdp=2")
    drawn = ("--prompt=a red ring", "--num_images=2", "--steps=2", "--out=new/grid.png")
    drawn += ("--files=new/files", "--solver=unipc", "--seed=3")
    scored = ("--num_images=6", "--steps=1", "--out=new/report.json")
    flags = {
        "dry": (LAUNCH / "train.py", scenes, "--dry_run", *mesh, "--config.seed=7"),
        "flagship": (LAUNCH / "train.py", f"--config={CONFIGS / 'fusion_2b.py'}"),
        "unknown": (LAUNCH / "train.py", scenes, "--config.optimiser.b1=0.5"),
        "sample": (LAUNCH / "sample.py", f"--checkpoint={trained}", *drawn),
        "evaluate": (LAUNCH / "evaluate.py", f"--checkpoint={trained}", *scored),
        "both": (
            LAUNCH / "evaluate.py",
            *(f"--checkpoint={trained / 'checkpoints' / step}" for step in ("2", "4")),
            *scored,
        ),
        "benchmark": (LAUNCH / "evaluate.py", f"--checkpoint={trained}", "--benchmark=genevl"),
        "nothing": (LAUNCH / "sample.py", "--checkpoint=nowhere"),
        "steps": (LAUNCH / "sample.py", f"--checkpoint={trained}", "--steps=1001"),
        "out": (LAUNCH / "sample.py", f"--checkpoint={trained}", "--out=grid"),
        "root": (
            pathlib.Path("launch/train.py"),
            "--config=configs/fusion_2b.py",
            "--dry_run",
        ),
        "elsewhere": (LAUNCH / "train.py", "--config=configs/fusion_2b.py"),
    }
    names, done = list(flags), {}
    for pair in (names[i : i + 2] for i in range(0, len(names), 2)):
        waits = {name: launch(*flags[name]) for name in pair}
        done |= {name: wait() for name, wait in waits.items()}
    for _, out, err, _ in done.values():
        assert "Traceback" not in out + err, err
    return done


def test_a_dry_run_says_what_it_would_do_and_does_nothing(runs):
    status, out, _, directory = runs["dry"]
    assert status == 0
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert lines["run"].endswith("scenes, seed 7, in runs/scenes")
    assert "24 px -> latents 24 x 24 x 3" in lines["images"]
    assert lines["mesh"].endswith("8 cpu: data 4 x fsdp 2 x tensor 1")
    assert "= 8 shards x" in lines["batch"] and "muon" in lines["steps"]
    assert list(directory.iterdir()) == []


def test_the_flagship_names_every_missing_file_and_how_to_get_it(runs):
    status, out, err, directory = runs["flagship"]
    assert status == 1
    assert "1,982,157,888 parameters: DiT 18 x 2048" in out
    assert "2,506,172,416 LLM 18 x 2048" in out
    llm, tokenizer, autoencoder, data = err[err.index("No llm") :].strip().split("\n\n")
    assert "weights/gemma-2b" in llm
    assert "hf download google/gemma-2b --local-dir weights/gemma-2b" in llm
    assert "tokenizer.json" in tokenizer and "hf download google/gemma-2b" in tokenizer
    assert "weights/sd3-vae" in autoencoder
    assert "hf download stabilityai/stable-diffusion-3-medium-diffusers" in autoencoder
    assert "data/cc12m-recaptioned/cc12m-train-0000.tar" in data and "--config.data.path" in data
    assert str(directory) in data
    assert list(directory.iterdir()) == []


def test_the_flagship_runs_from_the_root_by_its_relative_path(runs):
    status, out, err, _ = runs["root"]
    assert status == 0, err
    assert "1,982,157,888 parameters: DiT 18 x 2048" in out
    status, _, err, directory = runs["elsewhere"]
    assert status == 2
    assert f"no such config file in {directory}" in err
    assert f"Did you mean {CONFIGS / 'fusion_2b.py'}?" in err


def test_a_key_that_is_not_there_has_a_suggestion(runs):
    status, _, err, _ = runs["unknown"]
    assert status == 2
    assert "has no key optimiser.b1" in err
    assert "Did you mean --config.optimizer.b1?" in err


def test_sampling_draws_a_grid(runs):
    status, out, err, directory = runs["sample"]
    assert status == 0, err
    assert "2 images in new/grid.png and new/files" in out
    with Image.open(directory / "new" / "grid.png") as grid:
        assert grid.width >= 16 and grid.height >= 2 * 16


def test_every_picture_says_what_made_it(runs, trained):
    *_, directory = runs["sample"]
    lines = (directory / "new" / "files" / "images.jsonl").read_text().splitlines()
    assert len(lines) == 2
    for i, line in enumerate(map(json.loads, lines)):
        assert line["file"] == f"{i:05d}.png" and line["number"] == i
        assert (line["prompt"], line["seed"], line["solver"]) == ("a red ring", 3, "unipc")
        assert line["checkpoint"] == str(trained) and line["checkpoint_step"] == 4
        with Image.open(directory / "new" / "files" / line["file"]) as picture:
            assert picture.size == (16, 16) and json.loads(picture.text["drawn"]) == line
            config = configs.from_json(picture.text["config"])
    assert config.to_dict() == tiny.config(**tiny.WATCHED).to_dict()
    with Image.open(directory / "new" / "grid.png") as grid:
        assert json.loads(grid.text["drawn"])["prompts"] == ["a red ring"] * 2


def test_evaluation_leaves_a_report_a_page_and_the_images(runs):
    status, out, err, directory = runs["evaluate"]
    assert status == 0, err
    assert "scenes: accuracy" in out and "control, null" in out
    report = json.loads((directory / "new" / "report.json").read_text())
    assert report["num_images"] == 6 and report["checkpoint_step"] == 4
    assert "<html" in (directory / "new" / "report.html").read_text()
    images = sorted((directory / "new" / "report_images").glob("*/prompts/*.png"))
    assert [file.name for file in images] == [f"{i:05d}.png" for i in range(6)]
    status, _, err, directory = runs["both"]
    assert status == 0, err
    reports = json.loads((directory / "new" / "report.json").read_text())
    assert [report["checkpoint_step"] for report in reports] == [2, 4]
    assert len(list((directory / "new" / "report_images").iterdir())) == 2
    status, _, err, _ = runs["benchmark"]
    assert status == 2 and "Did you mean 'geneval'?" in err


def test_sampling_from_nothing_says_what_to_do(runs):
    status, _, err, _ = runs["nothing"]
    assert status == 1
    assert "No checkpoint at nowhere" in err and "launch/train.py" in err


def test_what_sampling_cannot_do_is_said_before_it_draws(runs):
    status, out, err, _ = runs["steps"]
    assert status == 2 and "steps = 1001: a sampler takes 1 to 1000 steps" in err
    status, out, err, directory = runs["out"]
    assert status == 2 and "--out=grid" in err and ".png" in err
    assert "drawing" not in out + err and list(directory.iterdir()) == []
