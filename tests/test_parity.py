"""The published PyTorch system's outputs, losses, gradients and samples, from its weights.

tests/goldens/NAME.npz are recordings of tang-bd/fuse-dit at toy size, in float32 (three are kept
here; `python launch/parity.py --goldens=DIR` takes others).
"""

import json
import pathlib

import numpy as np
import pytest

from t2i_jax import parity
from t2i_jax.interop import reference

FILES = sorted((pathlib.Path(__file__).parent / "goldens").glob("*.npz"))
QUANTITIES = {
    *("velocity", "loss", "gradient norm", "of a parameter"),
    *("training schedule", "sampling schedule", "samples"),
}


def changed(tmp_path, file, change):
    """A copy of a golden, `change(arrays)` applied."""
    arrays = dict(np.load(file))
    change(arrays)
    np.savez(tmp_path / file.name, **arrays)
    return tmp_path / file.name


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_everything_recorded_is_recomputed(file):
    report = parity.check(file)
    assert {error.name for error in report} >= QUANTITIES
    assert all(error.good for error in report), parity.row(file.stem, report)
    assert ("hidden states" in {error.name for error in report}) == ("baselinedit" in file.stem)


def test_other_recordings_are_over_tolerance(tmp_path):
    def change(arrays):
        for name in arrays:
            if name.startswith(("out/", "train/grad_norm_of/")) or name in (
                *("train/loss", "train/grad_norm", "sampler/latents"),
                *("sampler/sigmas", "sampler/train_sigmas"),
            ):
                arrays[name] = arrays[name] * np.float32(1.002)

    (file,) = (file for file in FILES if file.stem == "baselinedit-self")
    report = parity.check(changed(tmp_path, file, change))
    assert not any(error.good for error in report), parity.row(file.stem, report)
    assert "!" in parity.row(file.stem, report)


def test_a_gradient_that_is_not_recorded_counts(tmp_path):
    def drop(arrays):
        del arrays["train/grad_norm_of/dit.layers.1.mlp.up_proj.weight"]

    (file,) = (file for file in FILES if file.stem == "large-scale")
    report = {error.name: error for error in parity.check(changed(tmp_path, file, drop))}
    assert report["of a parameter"].value == np.inf
    assert report["gradient norm"].good


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("attention", "both", "attention = 'both'"),
        ("out_channels", 8, "out_channels = 8"),
        ("shared_attention_layers", [1], r"shared_attention_layers = \[1\]"),
        ("dit_num_hidden_layers", 2, "dit_num_hidden_layers = 2"),
        ("sandwich_norm", False, "another network"),
    ],
)
def test_configs_that_describe_another_model_are_refused(tmp_path, name, value, message):
    def change(arrays):
        theirs = json.loads(bytes(arrays["config.json"])) | {name: value}
        arrays["config.json"] = np.frombuffer(json.dumps(theirs).encode(), np.uint8)

    (file,) = (file for file in FILES if file.stem == "large-scale")
    with pytest.raises(ValueError, match=message):
        parity.read(changed(tmp_path, file, change))


def test_another_table_of_positions_is_refused(tmp_path):
    def change(arrays):
        arrays["transformer/dit.patch_embed.pos_embed"] = arrays[
            "transformer/dit.patch_embed.pos_embed"
        ][:, ::-1]

    (file,) = (file for file in FILES if file.stem == "adaln-single")
    with pytest.raises(ValueError, match="pos_embed is not the table"):
        parity.read(changed(tmp_path, file, change))


def test_sections_of_a_published_config():
    (file,) = (file for file in FILES if file.stem == "adaln-single")
    theirs = json.loads(bytes(np.load(file)["config.json"]))
    ours = reference.sections(theirs)
    assert ours["memory"] == {"source": "deep"} and ours["channels"] == 4
    assert ours["dit"] == {
        **{"width": 32, "num_layers": 3, "mlp_width": 64, "patch_size": 2, "attention": "joint"},
        **{"positions": "none", "table_size": 16, "table_range": 4.0, "pooled_width": 0},
        **{"conditioning": "adaln-single", "qk_norm": True, "sandwich_norm": False},
    }
