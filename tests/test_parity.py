"""The published PyTorch system's outputs, losses, gradients and samples, from its weights.

tests/goldens/NAME.npz are recordings of tang-bd/fuse-dit at toy size, in float32 (three are kept
here; `python launch/parity.py --goldens=DIR` takes others).
"""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from t2i_jax import parity
from t2i_jax.interop import reference, reference_config
from t2i_jax.models import fusion

ROOT = pathlib.Path(__file__).parent.parent

FILES = {f.stem: f for f in sorted((pathlib.Path(__file__).parent / "goldens").glob("*.npz"))}
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


@pytest.mark.parametrize("file", FILES.values(), ids=FILES)
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

    report = parity.check(changed(tmp_path, FILES["baselinedit-cross"], change))
    assert not any(error.good for error in report), parity.row("", report)
    assert "!" in parity.row("", report)


@pytest.mark.parametrize("value", [None, np.nan])
def test_a_gradient_that_is_not_recorded_counts(tmp_path, value):
    name = "train/grad_norm_of/dit.layers.1.mlp.up_proj.weight"

    def drop(arrays):
        del arrays[name]
        if value is not None:
            arrays[name] = np.float32(value)

    report = parity.check(changed(tmp_path, FILES["large-scale"], drop))
    report = {error.name: error for error in report}
    assert report["of a parameter"].value == np.inf and not report["of a parameter"].good
    assert report["gradient norm"].good


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("attention", "both", "attention = 'both'"),
        ("out_channels", 8, "out_channels = 8"),
        ("shared_attention_layers", [1], r"shared_attention_layers = \[1\]"),
        ("dit_num_hidden_layers", 2, "dit_num_hidden_layers = 2"),
        ("sandwich_norm", False, "another network"),
        ("pos_embed", "3d-rope", "pos_embed = '3d-rope'"),
        ("timestep_conditioning", "film", "timestep_conditioning = 'film'"),
        ("base_config", None, "no base_config"),
    ],
)
def test_configs_that_describe_another_model_are_refused(tmp_path, name, value, message):
    def change(arrays):
        theirs = json.loads(bytes(arrays["config.json"])) | {name: value}
        arrays["config.json"] = np.frombuffer(json.dumps(theirs).encode(), np.uint8)

    with pytest.raises(ValueError, match=message):
        parity.read(changed(tmp_path, FILES["large-scale"], change))


def test_another_table_of_positions_is_refused(tmp_path):
    def change(arrays):
        name = "transformer/dit.patch_embed.pos_embed"
        arrays[name] = arrays[name] * np.float32(1.001)

    file = FILES["clip-mod"]
    with pytest.raises(ValueError, match="pos_embed is not the table"):
        parity.read(changed(tmp_path, file, change))


def test_sections_of_a_published_config():
    theirs = json.loads(bytes(np.load(FILES["clip-mod"])["config.json"]))
    ours = reference_config.sections(theirs)
    assert ours["memory"] == {"source": "deep"} and ours["channels"] == 4
    assert ours["dit"] == {
        **{"width": 32, "num_layers": 3, "mlp_width": 64, "patch_size": 2, "attention": "joint"},
        **{"positions": "none", "table_size": 16, "table_range": 4.0, "pooled_width": 20},
        **{"conditioning": "adaln-zero", "qk_norm": True, "sandwich_norm": False},
    }


def test_the_published_cache_moves_rotary_images_and_no_others():
    """docs/fidelity.md has the figures; with a table of positions its cache is right."""
    assert parity.published_cache(FILES["large-scale"]) > 0.05
    assert parity.published_cache(FILES["clip-mod"]) < 1e-4


@pytest.mark.parametrize(
    "change, names",
    [
        (
            {"timestep_conditioning": "adaln-single"},
            {
                "dit/shared_modulation/linear/weight": "dit.t_block.1.weight",
                "dit/blocks/modulation/table": "dit.layers.{L}.scale_shift_table",
                "dit/final_modulation/table": "dit.scale_shift_table",
                "dit/blocks/attention_norm/weight": "dit.layers.{L}.input_layernorm.weight",
                "dit/final_norm/weight": "dit.norm_out.weight",
            },
        ),
        (
            {"attention": "cross", "timestep_conditioning": "addition"},
            {
                "dit/blocks/cross_q/weight": "dit.layers.{L}.cross_attn.q_proj.weight",
                "dit/blocks/cross_q_norm/weight": "dit.layers.{L}.cross_attn.q_norm.weight",
                "dit/blocks/cross_out/weight": "dit.layers.{L}.cross_attn.o_proj.weight",
                "dit/blocks/cross_post_norm/weight": (
                    "dit.layers.{L}.post_cross_attention_layernorm.weight"
                ),
                "dit/time_embed/time/out/bias": "dit.timestep_embedder.2.bias",
            },
        ),
        (
            {"model_type": "DiT"},
            {
                "memory/norm/weight": "context_embedder.0.weight",
                "memory/context/bias": "context_embedder.1.bias",
                "memory/layers/k/weight": "layers.{L}.self_attn.text_k_proj.weight",
                "dit/blocks/mlp_norm/weight": "layers.{L}.pre_feedforward_layernorm.weight",
                "dit/out/weight": "proj_out.weight",
            },
        ),
    ],
    ids=["adaln-single", "cross", "shallow"],
)
def test_published_names(change, names):
    theirs = json.loads(bytes(np.load(FILES["large-scale"])["config.json"])) | change
    model = fusion.build(**reference_config.sections(theirs))
    paths = reference.shapes(model, llm=theirs["model_type"] == "FuseDiT")
    rules = {rule.ours: rule.theirs for rule in reference.rules(theirs, paths)}
    assert rules.keys() == paths.keys() and len(set(rules.values())) == len(rules)
    assert names.items() <= rules.items()


def test_the_command_line_goes_on_after_what_is_no_recording(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK")
    np.savez(tmp_path / "b.npz", x=np.zeros(3))
    command = [sys.executable, "launch/parity.py", f"--goldens={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stdout.count("is not a recording") == 2
    assert "Over tolerance, or not read: a, b" in done.stderr
