"""What is advised where a program does not fit."""

import pytest

from t2i_jax import config as configs
from t2i_jax.speed import advice

GB = 10**9


def advised(what="train", needed=20, rows=4, data=1, fsdp=8, held=(1, 1, 2, 1), encoder=0, **keys):
    """First words of the advice for a report of a device of 16 GB; sizes in GB, `keys` as set."""
    config = configs.base().unlock()
    config.update_from_flattened_dict({key.replace("__", "."): x for key, x in keys.items()})
    peak = needed if needed is None else needed * GB
    report = {
        "what": what,
        "fits": False,
        "batch_size": rows * data * fsdp,
        "mesh": {"data": data, "fsdp": fsdp, "tensor": config.mesh.tensor},
        "bytes_needed": peak,
        "bytes_there": 16 * GB,
        "peaks": {what: peak, "encoder": encoder * GB},
        "memory": {name: x * GB for name, x in zip(advice.HELD, held, strict=True)},
    }
    return [text.split(":")[0] for text in advice.suggestions(report, config)]


def test_what_fits_needs_none():
    assert advice.suggestions({"fits": True}, configs.base()) == []


def test_activations_are_made_fewer():
    assert advised() == ["dit.remat = 'outputs'", "train.accumulation = 2"]
    assert advised(dit__remat="full", train__accumulation=2) == ["train.accumulation = 4"]
    assert advised("sample") == ["sampling.batch_size = 16", "autoencoder.tile = 32"]
    assert advised("sample", autoencoder__tile=16) == ["sampling.batch_size = 16"]


def test_one_row_is_parted():
    """Half of its heads and of its MLP, of the same rows at once."""
    parted = "mesh.tensor = 2, train.accumulation = 2"
    assert advised(rows=1, dit__remat="full") == [parted]
    assert advised("sample", rows=1, autoencoder__tile=16) == ["mesh.tensor = 2"]
    where_a_step_fits = {"needed": 9, "encoder": 20, "rows": 1, "fsdp": 1}
    assert advised(**where_a_step_fits) == ["data.source = 'latents'"]


def test_a_frozen_model_that_is_a_large_share_is_halved():
    int8, more = "train.llm_quantization = 'int8'", "more devices"
    held = (1, 1, 2, 7)
    assert advised(held=held, dit__remat="full", lora__rank=4, train__accumulation=4) == [
        "mesh.tensor = 2, train.accumulation = 8",
        int8,
        more,
    ]
    assert advised(held=(4, 4, 8, 7)) == [int8, more, "lora.rank = 16, with weights.start"]
    assert advised("sample", held=(12, 0, 0, 5), train__llm_quantization="int8") == [more]


def test_replicas_may_be_shards():
    found = advised(held=(4, 4, 8, 1), data=2)
    assert found == ["mesh.fsdp larger, mesh.data smaller", "lora.rank = 16, with weights.start"]


@pytest.mark.parametrize("what", ["train", "sample"])
@pytest.mark.parametrize("needed", [None, 17, 900])
@pytest.mark.parametrize("held", [(0, 0, 0, 0), (2, 2, 4, 2), (9, 9, 18, 1)])
@pytest.mark.parametrize("attention", ["auto", "xla"])
def test_there_is_always_some(what, needed, held, attention):
    """Where all that is known has been done already."""
    done = {"dit__remat": "full", "train__attention": attention, "autoencoder__tile": 8}
    done |= {"lora__rank": 4, "train__llm_quantization": "int8"}
    for fsdp in (1, 8):
        found = advised(what, needed, rows=1, fsdp=fsdp, held=held, **done)
        assert found and ("train.attention = 'xla'" in found) == (
            needed is None and attention == "auto"
        )
