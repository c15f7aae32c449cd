"""What is wrong with a directory is said in one line, and nothing is written."""

import fnmatch
import json
import shutil

from etils import epath
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from t2i_jax import convert, frozen
from t2i_jax.errors import ConfigError, UserError
from t2i_jax.interop import native
from tests import toys


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The same model in every format."""
    root = epath.Path(tmp_path_factory.mktemp("made"))
    model = toys.model("ablations/dit_self_attention", root / "source")
    for layout in convert.FORMATS:
        convert.write(model, root / layout, layout, "float32")
    return root


def tensors(change):
    def apply(folder):
        file = next(folder.glob("*.safetensors"))
        found = load_file(file)
        change(found)
        save_file(found, file)

    return apply


def truncate(folder):
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def halve_header(folder):
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:50])


def rename(found):
    name = next(n for n in found if n.endswith(("q.weight", "q_proj.weight")))
    found["stray.weight"] = found.pop(name)


def add(found):
    found["stray.weight"] = np.zeros(3, np.float32)


def reshape(found):
    name = next(n for n in found if n.endswith(("up.weight", "up_proj.weight")))
    found[name] = found[name][:, :-1].copy()


def poison(found):
    name = next(n for n in found if n.endswith(("up.weight", "up_proj.weight")))
    found[name] = found[name].copy()
    found[name][1, 2] = np.nan


def outside(folder):
    file = next(folder.glob("*.safetensors"))
    index = {"weight_map": {"a": "../../model.safetensors"}}
    (folder / f"{file.name}.index.json").write_text(json.dumps(index))
    file.unlink()


def pickled(folder):
    file = next(folder.glob("*.safetensors"))
    file.rename(file.with_name("pytorch_model.bin"))


def absent(folder):
    next(folder.glob("*.safetensors")).unlink()


BROKEN = {
    "truncated": (truncate, "is not a whole safetensors file"),
    "cut in the header": (halve_header, "is not a whole safetensors file"),
    "missing": (tensors(rename), r"holds another network\. 1 tensors missing: .*q.*weight"),
    "extra": (tensors(add), r"1 tensors not known: stray\.weight"),
    "shape": (tensors(reshape), r"1 tensors of another shape: .*up.* is \("),
    "nan": (tensors(poison), r"up.*weight has elements that are no finite float32"),
    "outside": (outside, r"names the file '\.\./\.\./model\.safetensors'; only"),
    "pickle": (pickled, r"only pickles \(pytorch_model\.bin\), which can run code"),
    "absent": (absent, r"it has neither model\.safetensors nor"),
}
FOLDERS = {"reference": "transformer", "diffusers": "transformer", "safetensors": ""}


@pytest.fixture
def broken(made, tmp_path):
    """A copy of the model in one format, to be broken."""

    def copy(layout):
        shutil.copytree(made / layout, tmp_path / "broken")
        return epath.Path(tmp_path / "broken")

    return copy


def refused(folder, message, **options):
    """Opening or writing it raises the message, and leaves nothing."""
    before = sorted(p.name for p in folder.parent.iterdir())
    with pytest.raises(UserError, match=message):
        model = convert.open_source(str(folder), **options)
        convert.write(model, folder.parent / "out", "safetensors", "float32")
    assert sorted(p.name for p in folder.parent.iterdir()) == before


@pytest.mark.parametrize("layout", FOLDERS)
@pytest.mark.parametrize("fault", BROKEN)
def test_broken_weights(broken, layout, fault):
    change, message = BROKEN[fault]
    folder = broken(layout)
    change(folder / FOLDERS[layout])
    refused(folder, message)


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"base_config": {"model_type": "mamba"}}, "model_type 'mamba'; known here: gemma, gemma2"),
        ({"attention": "linear"}, "No model here is that of attention = 'linear'"),
        ({"model_type": "FuseDiT"}, "holds another network|FuseDiT"),
        ({"dit_hidden_size": 16}, "holds another network.*of another shape"),
        ({"in_channels": 8, "out_channels": 8}, "another shape|has 8 channels"),
        ({"qk_norm": False}, "not known: layers.0.*_norm.weight"),
        ({"timestep_conditioning": "none"}, "timestep_conditioning = 'none'"),
    ],
)
def test_configs_of_other_models(broken, changes, message):
    folder = broken("reference")
    edit(folder / "transformer" / "config.json", **changes)
    refused(folder, message)


@pytest.mark.parametrize(
    "file, changes",
    [
        ("transformer/config.json", {"patch_size": 0}),
        ("transformer/config.json", {"patch_size": None}),
        ("scheduler/scheduler_config.json", {"shift": None}),
        ("vae/config.json", {"norm_num_groups": None}),
    ],
)
def test_numbers_that_are_none(broken, file, changes):
    folder = broken("reference")
    edit(folder / file, **changes)
    refused(folder, "does not make sense|must be positive|disagree")


def test_a_card_that_disagrees_with_the_weights(broken):
    folder = broken("reference")
    edit(folder / "vae" / "config.json", scaling_factor=2.0)
    refused(folder, r"its card disagree: autoencoder.scale is 2.0, in t2i_jax.json 1.5305")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format_version": 2}, "has format 2; this version of t2i_jax reads format 1"),
        ({"parts": ["dit", "soul"]}, r"parts are \['dit', 'soul'\]; known"),
        ({"parts": None}, "parts are None"),
        ({"config": {"name": "x"}}, "is missing"),
        ({"autoencoder": {"block_out_channels": [0]}}, "must be positive whole numbers"),
        ({"parts": ["llm"], "config": {}}, "does not make sense"),
    ],
)
def test_cards_that_are_none(broken, changes, message):
    folder = broken("safetensors")
    edit(folder / native.CARD, **changes)
    refused(folder, message)
    (folder / native.CARD).write_text("{")
    refused(folder, "is not valid JSON")


def test_nothing_is_replaced(made, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("data")
    model = convert.open_model(made / "safetensors")
    for layout in convert.FORMATS:
        with pytest.raises(ConfigError, match="is there already; nothing is replaced"):
            convert.write(model, out, layout, "float32")
    assert (out / "precious").read_text() == "data"
    with pytest.raises(ConfigError, match="gs://bucket/model: name a directory on a disk"):
        convert.write(model, "gs://bucket/model", "safetensors", "float32")


def test_directories_that_are_no_model(made, tmp_path):
    refused(
        made / "reference" / "transformer", "is the transformer of a pipeline: name .*reference"
    )
    for name, files in (
        ("empty", {}),
        ("sd3", {"model_index.json": {"_class_name": "StableDiffusion3Pipeline"}, "vae/x": {}}),
        ("bert", {"config.json": {"model_type": "bert"}}),
    ):
        folder = epath.Path(tmp_path / name)
        for file, content in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(json.dumps(content))
        folder.mkdir(exist_ok=True)
    refused(epath.Path(tmp_path / "empty"), "is no model. Known are checkpoints of a run")
    refused(epath.Path(tmp_path / "sd3"), "StableDiffusion3Pipeline, no pipeline of this.*sd3/vae")
    refused(epath.Path(tmp_path / "bert"), "is a 'bert'. Known are")
    refused(epath.Path(tmp_path / "nothing"), "nothing: no such directory")
    refused(made / "safetensors" / "model.safetensors", "is a file: name the directory")


def test_parts_are_imported_and_used(made, tmp_path):
    """What is in a folder of a pipeline, and the same after its import, is the same to a run."""
    toy = toys.model("ablations/dit_self_attention", tmp_path / "toy")
    for folder, part in (("llm", "llm"), ("vae", "autoencoder")):
        model = convert.open_model(made / "reference" / folder)
        assert model.parts == [part] and not model.whole
        out = convert.write(model, tmp_path / part, "safetensors", "float32")
        again = convert.open_model(out)
        for path, source in toy.part(part).items():
            np.testing.assert_array_equal(again.part(part)[path].read(), source.read())
        with pytest.raises(ConfigError, match="is a part of a model, and diffusers holds whole"):
            convert.write(model, tmp_path / "whole", "diffusers", "float32")
    config = toys.config("ablations/dit_self_attention").unlock()
    paths = {"llm": tmp_path / "llm", "autoencoder": tmp_path / "autoencoder"}
    config.weights.update({name: str(path) for name, path in paths.items()})
    config.weights.tokenizer = str(toy.tokenizer)
    assert frozen.missing(config) == []
    found = frozen.open_parts(config, tmp_path)
    for path, source in found.weights.items():
        np.testing.assert_array_equal(source.read(), toy.weights[path].read())
    config.llm.num_layers = 2  # the first ones
    cut = frozen.open_parts(config, tmp_path).weights["llm/blocks/mlp/up/weight"]
    np.testing.assert_array_equal(cut.read(), toy.weights["llm/blocks/mlp/up/weight"].read()[:2])
    config.llm.width = 48
    with pytest.raises(ConfigError, match=r"llm\.width is 48, width 32"):
        frozen.open_parts(config, tmp_path)
    config.weights.llm = str(tmp_path / "autoencoder")
    assert frozen.missing(config) == [f"{tmp_path}/autoencoder holds autoencoder, and no llm."]


def test_a_pipeline_with_a_sentencepiece_tokenizer_alone(broken, tmp_path, monkeypatch):
    """Which is read where the library is installed (tests/parity), and else asked for."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    folder = broken("reference")
    tokenizer = tmp_path / "elsewhere"
    (folder / "tokenizer").rename(tokenizer)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.model").write_bytes(b"sentencepiece")
    refused(folder, r"`pip install sentencepiece`(.|\n)*by --tokenizer=DIR")
    model = convert.open_source(str(folder), tokenizer=str(tokenizer))
    out = convert.write(model, tmp_path / "out", "safetensors", "float32")
    assert (out / "tokenizer" / "tokenizer.json").exists()


def test_a_repository_is_fetched_where_there_is_no_such_directory(made, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name == "owner/gated":
            raise OSError("401")
        return str(made / "reference")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert convert.open_source("owner/model").whole
    assert asked[0] == ("owner/model", ["*.json"]) and asked[1][0] == "owner/model"

    def fetched(file):
        return any(fnmatch.fnmatch(file, p) for _, patterns in asked for p in patterns)

    assert fetched("transformer/model-00001-of-00002.safetensors") and fetched("vae/config.json")
    for other in ("pytorch_model.bin", "pipeline.py", "text_encoder_3/model.safetensors"):
        assert not fetched(other)
    asked.clear()
    assert convert.open_source("owner/model/vae").parts == ["autoencoder"]
    assert asked[0] == ("owner/model", ["vae/*.json"]) and not fetched("llm/model.safetensors")
    with pytest.raises(UserError, match="text_encoder: no such directory"):  # of this model
        convert.open_source("owner/model/text_encoder")
    assert fetched("tokenizer/merges.txt") and fetched("text_encoder/model.safetensors")
    with pytest.raises(UserError, match=r"cannot be fetched from the Hugging Face Hub \(OSError"):
        convert.open_source("owner/gated")
