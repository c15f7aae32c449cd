"""Directories of both encoders of CLIP: what is read, what refused. (Values: tests/parity.)"""

import jax
import numpy as np
import pytest

from t2i_jax import sharding
from t2i_jax.interop.clip_model import Pictures, load_clip_model
from t2i_jax.interop.directory import find_weights
from t2i_jax.models.clip import CLIPText, CLIPVision
from tests import files

VOCABULARY = len(files.clip_vocabulary())


def test_both_encoders_are_read(tmp_path):
    place = sharding.replicated(sharding.make_mesh())
    model = load_clip_model(files.write_clip_model(tmp_path), place)
    assert model.text == CLIPText(**files.CLIP | {"vocab_size": VOCABULARY})
    assert model.vision == CLIPVision(12, 4, 20, 2, 5, 28, 10, "gelu", 1e-3)
    assert model.params.keys() == {"text", "vision"} and model.directory == tmp_path
    assert all(x.sharding == place for x in jax.tree.leaves(model.params))
    tensors = files.clip_model_tensors(VOCABULARY)
    kernel = tensors["vision_model.embeddings.patch_embedding.weight"]
    actual = model.params["vision"]["patches"]["weight"]
    np.testing.assert_array_equal(actual, kernel.transpose(2, 3, 1, 0))
    mean, deviation = (tuple(files.PICTURES_JSON[k]) for k in ("image_mean", "image_std"))
    assert model.pictures == Pictures(12, 12, 1 / 255, mean, deviation)


def test_configs_of_all_ages(tmp_path):
    """A text_config_dict goes before text_config; sizes are numbers or objects."""
    old = files.CLIP_JSON | {"vocab_size": VOCABULARY}
    changes = {
        "text_config_dict": old,
        "text_config": {"hidden_size": 1},
        "vision_config_dict": None,
    }
    new = {"size": {"shortest_edge": 14}, "crop_size": {"height": 12, "width": 12}}
    folder = files.write_clip_model(tmp_path, changes, new | {"rescale_factor": 0.5})
    model = load_clip_model(folder)
    assert model.text.width == 24
    usual = [files.PICTURES_JSON[k] for k in ("image_mean", "image_std")]
    assert model.pictures == Pictures(14, 12, 0.5, *map(tuple, usual))


def test_other_models_are_refused(tmp_path):
    def refused(*texts, **given):
        with pytest.raises(ValueError) as error:
            load_clip_model(files.write_clip_model(tmp_path, **given))
        assert all(text in str(error.value) for text in texts), error.value

    refused("model_type 'siglip'; only 'clip'", config={"model_type": "siglip"})
    refused("num_channels is 4", config={"vision_config": files.VISION_JSON | {"num_channels": 4}})
    refused("text_config is [1]", config={"text_config": [1]})
    tensors = files.clip_model_tensors(VOCABULARY)
    tensors["text_projection.bias"] = tensors.pop("visual_projection.weight")[:, 0].copy()
    tensors["vision_model.embeddings.class_embedding"] = np.zeros(21, "f4")
    refused("missing: visual_projection.weight", "not known: text_projection.bias",
            "class_embedding is (21,), not (20,)", tensors=tensors)  # fmt: skip
    squashed = {"size": {"height": 12, "width": 12}, "resample": 2, "do_normalize": False}
    refused("do_normalize is False", "not a shortest_edge of 12", "resample is 2, not 3 (bicubic)",
            pictures=files.PICTURES_JSON | squashed)  # fmt: skip
    refused("crop_size is 10, not 12", pictures=files.PICTURES_JSON | {"crop_size": 10})


def test_what_is_missing_is_named(tmp_path):
    (problem,) = find_weights(tmp_path / "clip", "clip_model")
    path = tmp_path / "clip"
    assert problem.endswith(f"hf download openai/clip-vit-large-patch14 --local-dir {path}")
    files.write_clip_model(path)
    assert find_weights(path, "clip_model") == []
    (path / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="preprocessor_config"):
        load_clip_model(path)
