"""Whole models from format to format: nothing is lost, whatever the way."""

import dataclasses
import json
import pathlib
import shutil

from flax.traverse_util import flatten_dict
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from t2i_jax import convert, parity
from t2i_jax.errors import ConfigError, UserError
from t2i_jax.interop import native, reference_config, stored
from t2i_jax.pipeline import Pipeline
from t2i_jax.training import loop
from tests import files, tiny, toys

GOLDENS = sorted((toys.FOLDER.parent / "tests" / "goldens").glob("*.npz"))


def contents(folder):
    """File -> bytes of a directory."""
    folder = pathlib.Path(folder)
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def bits(model):
    """Path -> bytes of every parameter."""
    return {path: np.ascontiguousarray(s.read()).tobytes() for path, s in model.weights.items()}


@pytest.mark.parametrize("name", toys.STRUCTURES)
def test_a_model_goes_through_every_format_bit_by_bit(tmp_path, name):
    model = toys.model(name, tmp_path / "source")
    formats = [f for f in convert.FORMATS if f != "reference" or name in toys.PUBLISHED]
    for layout in formats:
        out = convert.write(model, tmp_path / layout, layout, "float32")
        again = convert.open_model(out)
        assert bits(again) == bits(model)
        assert again.config == model.config
        assert (again.step, again.averaged, again.autoencoder) == (7, True, toys.VAE)
        imported = convert.write(again, tmp_path / f"from_{layout}", "safetensors", "float32")
        assert contents(imported) == contents(tmp_path / "safetensors")
        back = convert.write(
            convert.open_model(imported), tmp_path / f"back_{layout}", layout, "float32"
        )
        assert contents(back) == contents(out)
        assert convert.differences(again, model) == []


@pytest.mark.parametrize("name", toys.OURS)
def test_what_the_published_system_lacks_is_named(tmp_path, name):
    model = toys.model(name, tmp_path / "source")
    with pytest.raises(ValueError, match=r"No published model has (memory\.source|a language)"):
        convert.write(model, tmp_path / "out", "reference", "float32")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def strangers_pipeline(golden, folder, tmp_path):
    """A recording's model as the published code saves it, without a card of ours."""
    c = golden.theirs
    baseline, pooled = c["model_type"] == "DiT", c["text_modulation_embeds_dim"]
    kind = "DiTPipeline" if baseline else "FuseDiTPipeline" + ("WithCLIP" if pooled else "")
    toy = convert.write(
        toys.model("ablations/baseline", tmp_path / "toy"),
        tmp_path / "made",
        "reference",
        "float32",
    )
    for name in ("vae", "tokenizer"):
        shutil.copytree(toy / name, folder / name)
    parts = {"transformer": (c, arrays(golden, "transformer/"))}
    if baseline:
        parts["llm"] = (c["base_config"], arrays(golden, "llm/"))
    if pooled:
        tensors = files.clip_tensors()
        tensors["text_projection.weight"] = np.ones((pooled, 24), "f4")
        parts["clip"] = (files.CLIP_JSON | {"projection_dim": pooled}, tensors)
        files.write_clip(folder / "clip_tokenizer")
    for name, (config, tensors) in parts.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        save_file(tensors, folder / name / "model.safetensors")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"shift": 2.5}')
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))


def arrays(golden, prefix):
    """Name -> array of the recording's tensors of one folder."""
    return {n.removeprefix(prefix): x for n, x in golden.arrays.items() if n.startswith(prefix)}


@pytest.mark.parametrize("file", GOLDENS, ids=lambda file: file.stem)
def test_a_published_pipeline_of_others_comes_and_goes(tmp_path, file):
    golden, folder = parity.read(file), tmp_path / "theirs"
    strangers_pipeline(golden, folder, tmp_path)
    imported = convert.write(
        convert.open_source(str(folder)), tmp_path / "ours", "safetensors", "float32"
    )
    model = convert.open_model(imported)
    expected = flatten_dict(golden.params, sep="/")
    for path, x in expected.items():
        np.testing.assert_array_equal(model.weights[path].read(), x, strict=True)
    assert {p for p in model.weights if p.split("/")[0] in ("llm", "dit", "memory")} == {*expected}
    for name, section in reference_config.sections(golden.theirs).items():
        if name != "channels":
            assert {key: model.config[name][key] for key in section} == section
    assert model.config.flow.shift == 2.5 and model.averaged is None and model.step is None
    wide = 512 if golden.theirs["pos_embed"] != "ape" else 256  # all that the table has
    assert model.config.data.image_size == wide
    back = convert.write(model, tmp_path / "back", "reference", "float32")
    for name in ("transformer", "llm", "vae"):
        if (folder / name).exists():
            theirs, ours = (read_all(root / name) for root in (folder, back))
            assert theirs.keys() == ours.keys()
            for key, x in theirs.items():
                np.testing.assert_array_equal(ours[key], x, strict=True)
    index = json.loads((back / "model_index.json").read_text())
    assert (
        index["_class_name"] == json.loads((folder / "model_index.json").read_text())["_class_name"]
    )


def read_all(folder):
    """Name -> array, by the library of the format."""
    return {n: x for file in folder.glob("*.safetensors") for n, x in load_file(file).items()}


class Watched:
    """A parameter that must not be read as a whole where it has layers."""

    def __init__(self, path, source):
        self.path, self.shape, self.dtype, self.source = path, source.shape, source.dtype, source

    def read(self, layer=None):
        assert (layer is None) == ("{L}" not in native.flat_name(self.path)), self.path
        return self.source.read(layer)


@pytest.mark.parametrize("layout", convert.FORMATS)
def test_layers_pass_one_at_a_time(tmp_path, layout):
    model = toys.model("ablations/dit_cross_attention", tmp_path / "source")
    watched = {path: Watched(path, source) for path, source in model.weights.items()}
    model = dataclasses.replace(model, weights=watched)
    convert.write(model, tmp_path / "out", layout, "float32")


@pytest.mark.parametrize("layout", convert.FORMATS)
def test_bfloat16_in_several_files(tmp_path, layout, monkeypatch):
    model = toys.model("ablations/clip_mod", tmp_path / "source")
    monkeypatch.setattr(stored, "WEIGHTS_LIMIT", 40_000)
    again = convert.open_model(convert.write(model, tmp_path / "out", layout, "bfloat16"))
    assert len([*(tmp_path / "out").rglob("*.safetensors")]) > 5
    for path, source in model.weights.items():
        rounded = source.read().astype(jnp.bfloat16)
        np.testing.assert_array_equal(again.weights[path].read(), rounded, strict=True)
    found = convert.differences(again, model)
    assert len(found) > 100 and "dit/out/weight differs by up to" in "".join(found)


def test_a_checkpoint_is_exported_and_draws_the_same(tmp_path, trained):
    expected = Pipeline.load(trained).draw(["a red ring"], seed=1)
    for layout in ("safetensors", "diffusers"):
        model = convert.open_model(trained)
        out = convert.write(model, tmp_path / layout, layout, "float32")
        drawn = Pipeline.load(out).draw(["a red ring"], seed=1)
        np.testing.assert_array_equal(drawn, expected)
        again = convert.open_model(out)
        assert again.step == 4 and again.averaged and again.config.weights.llm == "."
        assert str(tmp_path) not in (out / native.CARD).read_text()
    with pytest.raises(ConfigError, match="has the averaged weights alone"):
        convert.open_model(out, averaged=False)
    raw = convert.open_model(trained, averaged=False)
    found = convert.differences(raw, model)
    assert found and all(line.startswith("dit/") for line in found)
    with pytest.raises(ConfigError, match="this model draws pixels"):
        convert.write(model, tmp_path / "reference", "reference", "float32")
    text = convert.describe(model)
    assert "step 4, weights EMA" in text and "checkpoint in" in text and "float32" in text


def test_an_incomplete_run_is_not_exported(tmp_path, trained):
    for part, message in (
        ("llm", "There are no saved arrays in .*llm"),
        ("checkpoints/4/ema", "There are no saved arrays in .*ema"),
        ("checkpoints/4/meta", "is damaged"),
    ):
        run = tmp_path / part.replace("/", "_")
        shutil.copytree(trained, run)
        shutil.rmtree(run / part)
        with pytest.raises(UserError, match=message):
            convert.open_model(run)
    run = tmp_path / "other"
    shutil.copytree(trained, run)
    shutil.rmtree(run / "llm")
    shutil.copytree(run / "checkpoints" / "4" / "ema", run / "llm")
    with pytest.raises(UserError, match=r"holds another network\..*missing: llm/.*not known: llm/"):
        convert.open_model(run)


def test_training_starts_from_a_model(tmp_path, trained):
    model = convert.open_model(trained)
    out = convert.write(model, tmp_path / "start", "safetensors", "float32")
    changes = {"train__steps": 2, "train__batch_size": 8, "optimizer__learning_rate": 1e-9}
    config = tiny.config(**changes, optimizer__name="adamw", weights__start=str(out))
    config = config.unlock()
    config.weights.update(llm=str(out), tokenizer=str(out))
    config.lock()
    ended = loop.train(config, tmp_path / "run")
    for path, x in flatten_dict(ended.params, sep="/").items():
        np.testing.assert_allclose(x, model.weights[path].read(), rtol=0, atol=1e-6)
    with config.unlocked():
        config.dit.positions = "m-rope"
    with pytest.raises(ConfigError, match=r"dit\.positions is m-rope, there 2d-rope"):
        loop.train(config, tmp_path / "other")
    with config.unlocked():
        config.weights.start = str(tmp_path / "nowhere")
    with pytest.raises(loop.SetupError, match="nowhere': no such directory"):
        loop.train(config, tmp_path / "other")
