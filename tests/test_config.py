import os
from pathlib import Path
import re
import subprocess
import sys

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags
import pytest

from t2i_jax import cli
from t2i_jax import config as configs
from t2i_jax.config import ConfigError, from_json, load, to_json, validate
from t2i_jax.values import CHOICES, RANGES

ROOT = Path(__file__).parent.parent
NO_CONFIGS = ("llms", "paper_full")  # what configs import, and a suite of other files
FILES = sorted(
    str(path) for path in (ROOT / "configs").rglob("*.py") if path.stem not in NO_CONFIGS
)
SMALL = {  # a config that works, so small that the tests can count
    "name": "small",
    "weights": {"llm": "", "tokenizer": "", "autoencoder": ""},
    "llm": {"vocab_size": 260, "width": 128, "num_layers": 6, "num_heads": 4, "num_kv_heads": 4},
    "pretrain": {"steps": 300, "vocab_size": 260},
    "dit": {"num_layers": 6, "patch_size": 4},
    "autoencoder": {"kind": "identity", "channels": 3, "downsample": 1},
    "data": {"source": "scenes", "path": "", "image_size": 24},
    "train": {"steps": 1000, "batch_size": 128},
    "optimizer": {"schedule": "linear"},
    "validation": {"every": 250},
    "sampling": {"every": 250},
}
FILE = f"""
from configs import base

def get_config():
    config = base.get_config()
    config.update({SMALL})
    return config
"""


def changed(**values) -> ConfigDict:
    """The small config with some of its values replaced; '__' is a dot."""
    config = configs.base().unlock()
    config.update(SMALL)
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in values.items()})
    return config.lock()


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    """The path of a file with the small config."""
    path = tmp_path_factory.mktemp("configs") / "small.py"
    path.write_text(FILE)
    return str(path)


def problems(config: ConfigDict) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        validate(config, configs.base())
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


@pytest.mark.parametrize("file", FILES)
def test_every_config_is_valid_and_locked(file):
    config = load(file)
    assert config.is_locked
    assert not configs.differences(config, configs.base())


def test_tables_name_keys_that_exist():
    assert set(CHOICES) | set(RANGES) <= set(configs.flat(configs.base()))


def test_the_comments_of_base_list_the_choices():
    text = (ROOT / "configs" / "base.py").read_text()
    listed = {}
    for key, comment in re.findall(r"config\.(\w+\.\w+) = .*?  # (.*)", text):
        if " | " in comment:
            listed[key] = {re.match(r" *'([^']+)'", part)[1] for part in comment.split("|")}
    assert len(listed) >= 6
    assert listed == {key: set(CHOICES[key]) for key in listed}


CONTRADICTIONS = {
    "llm.num_heads = 6 is not divisible by llm.num_kv_heads = 4": {"llm__num_heads": 6},
    "llm.head_width = 30 is not divisible by 4": {"llm__head_width": 30},
    "dit.num_layers = 7 is more than llm.num_layers = 6": {"dit__num_layers": 7},
    "dit.table_size = 5 is less than the 6 patches": {"dit__table_size": 5},
    "dit.width = 130 is not divisible by 4": {"dit__table_size": 8, "dit__width": 130},
    "data.image_size = 26 is not divisible by autoencoder.downsample * dit.patch_size = 4": {
        "data__image_size": 26
    },
    "autoencoder.channels = 4, but autoencoder.kind = 'identity' (pixels) has 3": {
        "autoencoder__channels": 4
    },
    "autoencoder.downsample = 2, but autoencoder.kind = 'identity' (pixels) has 1": {
        "autoencoder__downsample": 2
    },
    "weights.autoencoder = 'vae', but autoencoder.kind = 'identity' has no weights": {
        "weights__autoencoder": "vae"
    },
    "weights.autoencoder = '', but autoencoder.kind = 'kl' needs weights": {
        "autoencoder__kind": "kl"
    },
    "train.batch_size = 128 is not divisible by train.accumulation = 3": {"train__accumulation": 3},
    "weights.llm = '' and pretrain.steps = 0": {"pretrain__steps": 0},
    "weights.tokenizer = '', but weights.llm = 'gemma' needs its own": {"weights__llm": "gemma"},
    "weights.tokenizer = '' and pretrain.vocab_size = 0": {"pretrain__vocab_size": 0},
    "pretrain.vocab_size = 300 is more than llm.vocab_size = 260": {"pretrain__vocab_size": 300},
    "pretrain.vocab_size = 259 must be 0, or at least 260": {"pretrain__vocab_size": 259},
    "sampling.steps = 30 is more than flow.num_timesteps = 20": {
        "sampling__steps": 30,
        "flow__num_timesteps": 20,
    },
    "sampling.steps = 0 must be positive": {"sampling__steps": 0},
    "sampling.every = 250, but sampling.prompts is empty": {"sampling__prompts": ()},
    "sampling.guidance = -1.0 must be zero or more": {"sampling__guidance": -1.0},
    "data.caption_dropout = 1.5 must be from 0 to 1": {"data__caption_dropout": 1.5},
    "data.max_text_tokens = 1 must be at least 2": {"data__max_text_tokens": 1},
    "data.flip = True, but data.source = 'scenes' has a left and a right": {"data__flip": True},
    "data.original_caption_rate = 0.5, but data.source = 'scenes' has one caption a sample": {
        "data__original_caption_rate": 0.5
    },
    "data.path = '', but data.source = 'webdataset' needs it": {"data__source": "webdataset"},
    "ema.decay = 1.0 must be at least 0 and below 1": {"ema__decay": 1.0},
    "optimizer.b1 = 1.0 must be at least 0 and below 1": {"optimizer__b1": 1.0},
    "optimizer.eps = nan must be positive": {"optimizer__eps": float("nan")},
    "optimizer.learning_rate = inf must be positive": {"optimizer__learning_rate": float("inf")},
    "optimizer.warmup_steps = 1000 is not less than train.steps = 1000": {
        "optimizer__warmup_steps": 1000
    },
    "optimizer.warmup_steps = 600 + optimizer.decay_steps = 600 is more than train.steps": {
        "optimizer__warmup_steps": 600,
        "optimizer__decay_steps": 600,
    },
    "optimizer.decay_steps = 9, but optimizer.schedule = 'constant' does not decay": {
        "optimizer__decay_steps": 9,
        "optimizer__schedule": "constant",
    },
    "validation.every = 250, but data.validation_size = 0": {"data__validation_size": 0},
    "validation.every = 250, but validation.timesteps is empty": {"validation__timesteps": ()},
    "validation.timesteps = (0.0, 0.5) must be above 0": {"validation__timesteps": (0.0, 0.5)},
    "mesh.tensor = 0 must be positive, or -1: the rest of the devices": {"mesh__tensor": 0},
    "mesh.data = mesh.tensor = -1: one axis takes the rest": {"mesh__fsdp": 1, "mesh__tensor": -1},
    "train.batch_size / train.accumulation = 64 is not divisible by mesh.data * mesh.fsdp = 48": {
        "train__accumulation": 2,
        "mesh__fsdp": 16,
        "mesh__data": 3,
    },
    "llm.width = -128 must be positive": {"llm__width": -128},
    "seed = -1 must be from 0 to 2**32 - 1": {"seed": -1},
    "name = '../x' must be letters": {"name": "../x"},
    "dit.conditioning = 'adaln_zero' is unknown; known: ['adaln-zero', "
    "'adaln-single', 'addition', 'none']. Did you mean adaln-zero?": {
        "dit__conditioning": "adaln_zero"
    },
    "dit.remat = 'product' is unknown; known: ['none', 'products', 'outputs', 'offload', "
    "'full']. Did you mean products?": {"dit__remat": "product"},
}


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_a_contradiction_is_named(message):
    (problem,) = problems(changed(**CONTRADICTIONS[message]))
    assert problem.startswith(message)


@pytest.mark.parametrize("key", CHOICES)
def test_an_unknown_choice_is_named(key):
    found = problems(changed(**{key.replace(".", "__"): CHOICES[key][0] + "_"}))
    start = f"{key} = '{CHOICES[key][0]}_' is unknown; known: {list(CHOICES[key])}. Did you mean "
    assert any(p == f"{start}{CHOICES[key][0]}?" for p in found)


def test_original_captions_need_a_field():
    config = changed(data__original_caption_rate=0.5, data__source="webdataset", data__path="x.tar")
    config.data.original_caption_field = ""
    (problem,) = problems(config)
    assert problem.startswith("data.original_caption_rate = 0.5, but data.original_caption_field")


def test_all_problems_are_in_one_message():
    config = changed(llm__num_heads=6, optimizer__name="adamv").unlock()
    config.train.stepps = 5
    del config.dit["width"]
    assert problems(config) == [
        "dit.width is missing (configs/base.py has it)",
        "train.stepps is not a key of configs/base.py. Did you mean train.steps?",
        "optimizer.name = 'adamv' is unknown; known: ['adamw', 'muon']. Did you mean adamw?",
        "llm.num_heads = 6 is not divisible by llm.num_kv_heads = 4",
    ]


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("steps", "5", "train.steps = '5' is str, not int like 500000"),
        ("steps", True, "train.steps = True is bool, not int like 500000"),
        ("dtype", 32, "train.dtype = 32 is int, not str like 'bfloat16'"),
    ],
)
def test_another_type_is_named(key, value, message):
    config = changed().unlock()
    with config.ignore_type():
        config.train[key] = value
    assert problems(config) == [message]


def test_types_inside_tuples_are_checked():
    (problem,) = problems(changed(validation__timesteps=("a", 0.5)))
    assert problem.startswith("validation.timesteps = ('a', 0.5) is tuple of float/str, not tuple ")
    validate(changed(validation__timesteps=(0.5, 1)), configs.base())  # 1 is as good as 1.0


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("trian.steps", ["train.steps", "pretrain.steps"]),
        ("train.batchsize", ["train.batch_size"]),
        ("dit.ema_decay", ["ema.decay"]),
        ("model.sandwich_norm", ["dit.sandwich_norm"]),
        ("xyzzy", []),
    ],
)
def test_nearest_keys(key, nearest):
    assert configs.nearest(key, configs.flat(configs.base())) == nearest


def test_json_gives_the_same_config():
    config = changed(sampling__guidance=0.1 + 0.2, validation__timesteps=(1 / 3, 1.0))
    again = from_json(to_json(config))
    ours, theirs = configs.flat(config), configs.flat(again)
    assert list(ours) == list(theirs) and ours == theirs and again.is_locked
    assert [type(v) for v in ours.values()] == [type(v) for v in theirs.values()]
    assert theirs["flow.shift"] == 3.0 and type(theirs["flow.shift"]) is float
    assert theirs["validation.timesteps"] == (1 / 3, 1.0)
    assert to_json(again) == to_json(config)
    validate(again, configs.base())


@pytest.mark.parametrize("text", ["", "[1]", "{", '"x"', "NaN", '{"a.b": 1}', "[" * 100_000])
def test_what_is_no_config_is_refused(text):
    with pytest.raises(ConfigError, match="not a config's JSON"):
        from_json(text)


def test_json_refuses_what_it_cannot_keep():
    with pytest.raises(ConfigError, match="prompts = \\['a'\\]"):
        to_json(ConfigDict({"prompts": ["a"]}))
    with pytest.raises(ConfigError, match="not finite"):
        to_json(ConfigDict({"x": float("nan")}))


def test_a_config_file_that_fails_is_named_with_its_line(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from configs import base\n\ndef get_config():\n    return base.get_confg()\n")
    with pytest.raises(ConfigError, match=r"mine.py, line 4: AttributeError: .*get_confg"):
        load(str(file))
    file.write_text("get_confg = 1\n")
    with pytest.raises(ConfigError, match=r"mine.py defines no get_config\(\)"):
        load(str(file))
    file.write_text("def get_config():\n    return {}\n")
    with pytest.raises(ConfigError, match="must return a ConfigDict"):
        load(str(file))
    with pytest.raises(ConfigError, match=r"min.py: no such config file. Did you mean .*mine.py\?"):
        load(str(tmp_path / "min.py"))
    file.write_text(
        "from configs import base\n\ndef get_config(name):\n    config = base.get_config()\n"
        "    config.name = name\n    return config\n"
    )
    assert load(f"{file}:other").name == "other"


OVERRIDES = {
    "--config.trian.steps=5": "--config.trian.steps=5: {config} has no key trian.steps. "
    "Did you mean --config.train.steps or --config.pretrain.steps?",
    "--config.train.steps=abc": "--config.train.steps=abc: train.steps is of type int "
    "(1000 in {config}), 'abc' is not.",
    "--config.dit.qk_norm=maybe": "--config.dit.qk_norm=maybe: dit.qk_norm is of type bool "
    "(True in {config}), 'maybe' is not.",
    "--config.mesh={}": "--config.mesh={{}}: mesh is a section of {config}; set its keys: "
    "--config.mesh.data, --config.mesh.fsdp, --config.mesh.tensor.",
    "--config.train.steps": "--config.train.steps has no value; {config} has train.steps = 1000.",
    "--config.llm.num_heads=6": "the config 'small' has a problem:\n"
    "  llm.num_heads = 6 is not divisible by llm.num_kv_heads = 4",
    "steps=5": "what is 'steps=5'? Flags look like --name=value.",
    "--wrokdir=y": "Unknown command line flag 'wrokdir'. Did you mean: workdir ? "
    "(--help lists all flags.)",
}


@pytest.fixture
def parse(monkeypatch):
    """cli.parse_flags with a config flag and a required --workdir; gives the flags' values."""

    def run(*arguments):
        values, argv = flags.FlagValues(), ["script.py", *arguments]
        monkeypatch.setattr(flags, "FLAGS", values)
        monkeypatch.setattr(sys, "argv", argv)
        config_flags.DEFINE_config_file("config", flag_values=values)
        flags.DEFINE_string("workdir", None, "where", flag_values=values, required=True)
        cli.parse_flags(argv)
        return values

    return run


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_wrong_command_line_gets_one_message(parse, small, override):
    with pytest.raises(ConfigError) as caught:
        parse("--workdir=x", f"--config={small}", override)
    assert str(caught.value) == OVERRIDES[override].format(config=small)


def test_all_wrong_overrides_are_in_one_message(parse, small):
    with pytest.raises(ConfigError) as caught:
        parse(f"--config={small}", "--config.train.steps=1e3", "--config.flw.shift", "2")
    assert str(caught.value).splitlines() == [
        f"--config.train.steps=1e3: train.steps is of type int (1000 in {small}), '1e3' is not.",
        f"--config.flw.shift: {small} has no key flw.shift. "
        "Did you mean --config.flow.shift or --config.autoencoder.shift?",
    ]


def test_a_command_line_without_a_config_or_with_a_missing_one(parse, small):
    with pytest.raises(
        ConfigError, match=r"steps=5 changes a config, but there is none: --config="
    ):
        parse("--workdir=x", "--config.train.steps=5")
    missing = small.replace("small.py", "smal.py")
    with pytest.raises(ConfigError) as caught:
        parse("--workdir=x", f"--config={missing}")
    assert str(caught.value) == f"{missing}: no such config file. Did you mean {small}?"
    with pytest.raises(ConfigError, match=r"^--workdir=\.\.\. is required\."):
        parse(f"--config={small}")


def test_overrides_reach_the_config(parse, small):
    values = parse(
        *("--workdir=x", "--config", small, "--config.train.steps", "70", "--config.flow.shift=2"),
        *("--noconfig.dit.qk_norm", "--config.validation.timesteps=(0.25, 0.5)"),
        *("--config.sampling.prompts=a", "--config.sampling.prompts=b"),
    )
    config = values.config
    assert config.train.steps == 70 and config.dit.qk_norm is False
    assert config.flow.shift == 2.0 and type(config.flow.shift) is float
    assert config.validation.timesteps == (0.25, 0.5)
    assert config.sampling.prompts == ("a", "b")


SCRIPT = """
from ml_collections.config_flags import config_flags
from t2i_jax import cli
from t2i_jax.errors import ConfigError, UserError

CONFIG = config_flags.DEFINE_config_file("config")

def main(argv):
    if CONFIG.value.train.steps == 13:
        raise ConfigError("13 is bad luck")
    if CONFIG.value.train.steps == 14:
        raise UserError("14 is no better")
    print(CONFIG.value.train.steps)

cli.run(main)
"""


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("--config.train.steps=70", (0, "70\n", "")),
        ("--config.train.steps=13", (2, "", "script.py: 13 is bad luck\n")),
        ("--config.train.steps=14", (1, "", "script.py: 14 is no better\n")),
        (
            "--config.train.stesp=5",
            (
                2,
                "",
                "script.py: --config.train.stesp=5: {config} has no key train.stesp. "
                "Did you mean --config.train.steps?\n",
            ),
        ),
    ],
)
def test_a_launch_script_ends_with_the_message_alone(tmp_path, small, argument, expected):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py", f"--config={small}", argument],
        capture_output=True,
        text=True,
        cwd=tmp_path,  # not where configs/ is
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        check=False,
    )
    status, out, err = expected
    assert (done.returncode, done.stdout, done.stderr) == (status, out, err.format(config=small))


def test_config_flags_can_be_handed_on_however_they_are_typed(parse, small):
    parse("--workdir=x", f"--config={small}")
    argv = ["x", "--config", "a.py", "-config.b.c=1", "--config.d", "2", "--workdir=3"]
    argv += ["--config.dit.qk_norm", "--noconfig.dit.sandwich_norm"]
    assert cli.config_arguments("config", argv) == [
        ("config", "a.py"),
        ("config.b.c", "1"),
        ("config.d", "2"),
        ("config.dit.qk_norm", "true"),
        ("config.dit.sandwich_norm", "false"),
    ]


def test_flags_that_are_not_read_are_refused(parse, small):
    parse("--workdir=x", f"--config={small}")
    with pytest.raises(ConfigError, match="--workdir does not go with data"):
        cli.refuse("workdir", where="data")
