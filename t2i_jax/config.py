"""Configs: read, checked before anything runs, kept in checkpoints.

A config is a locked `ml_collections.ConfigDict`. configs/base.py is the schema: its keys are all
keys there are, its values give their types. Whatever is wrong is said at start, all of it in one
ConfigError, every line naming a key (t2i_jax/cli.py shows it without a traceback).
"""

from collections.abc import Iterator, Sequence
import contextlib
import difflib
import importlib
import importlib.util
import json
from pathlib import Path
import re
import sys
import traceback
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from t2i_jax.errors import ConfigError
from t2i_jax.rules import contradictions, did_you_mean, flat

# Keys that configs in older checkpoints and exports lack, with the values that they had unsaid.
_LATER: dict[str, Any] = {
    "sampling.solver": "euler",
    "sampling.guidance_method": "plain",
    "sampling.guidance_interval": (0.0, 1.0),
    "sampling.guidance_rescale": 0.7,
    "sampling.apg_parallel": 0.0,
    "sampling.apg_norm": 0.0,
    "sampling.apg_momentum": -0.5,
    "sampling.zero_steps": 1,
    "data.shuffle_captions": False,
    "evaluation.every": 0,
    "evaluation.num_images": 300,
    "evaluation.inception": "",
    "evaluation.clip": "",
}

# --- reading ---


def base() -> ConfigDict:
    """configs/base.py of the checkout: beside the running launch script, or beside this package.

    Makes `from configs import ...` work for config files, wherever the program was started.
    """
    for root in _roots():
        if (root / "configs" / "base.py").is_file():
            if str(root) not in sys.path:
                sys.path.insert(0, str(root))
            return importlib.import_module("configs.base").get_config()
    looked = ", ".join(map(str, _roots()))
    raise ConfigError(f"configs/base.py, the schema of every config, is not in {looked}")


def _roots() -> list[Path]:
    """Where a checkout may be."""
    files = (sys.argv[0], __file__)
    return list(dict.fromkeys(Path(file).resolve().parent.parent for file in files))


def load(path: str) -> ConfigDict:
    """The checked, locked config of 'configs/scenes.py' or 'configs/file.py:argument'."""
    schema = base()
    config = read(path)
    validate(config, schema)
    return config.lock()


def find_folder(name: str) -> Path:
    """A folder of the checkout, such as configs/suites."""
    found = [root / name for root in _roots() if (root / name).is_dir()]
    if not found:
        raise ConfigError(f"There is no folder {name} in {', '.join(map(str, _roots()))}.")
    return found[0]


def module(path: str) -> ModuleType:
    """A config's file as a module. Raises ConfigError where there is none, or it fails."""
    base()
    file = path.split(":", 1)[0]
    if not Path(file).is_file():
        beside = sorted(str(p) for p in Path(file).parent.glob("*.py"))
        elsewhere = (str(root / file) for root in _roots() if (root / file).is_file())
        hint = did_you_mean([*elsewhere] or difflib.get_close_matches(file, beside, 1))
        where = "" if Path(file).is_absolute() else f" in {Path.cwd()}"
        raise ConfigError(f"{file}: no such config file{where}.{hint}")
    spec = importlib.util.spec_from_file_location("config_file", file)
    found = importlib.util.module_from_spec(spec)
    with _failing(file):
        spec.loader.exec_module(found)
    return found


def read(path: str) -> ConfigDict:
    """What the file's get_config returns, unchecked."""
    file, *argument = path.split(":", 1)
    found = module(path)
    if not hasattr(found, "get_config"):
        raise ConfigError(f"{file} defines no get_config(): it is not a config.")
    with _failing(file):
        config = found.get_config(*argument)
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{file}: get_config() must return a ConfigDict, got {type(config)}.")
    return config


@contextlib.contextmanager
def _failing(file: str) -> Iterator[None]:
    """What goes wrong in a user's file is told with its line."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        line = f", line {frames[-1].lineno}" if frames else ""
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        raise ConfigError(f"{file}{line}: {type(error).__name__}: {text}") from error


def to_json(config: ConfigDict) -> str:
    """Text from which `from_json` makes the same config: types, tuples and floats exactly."""
    for key, value in flat(config).items():
        parts = value if isinstance(value, tuple) else (value,)
        if not all(part is None or type(part) in (bool, int, float, str) for part in parts):
            raise ConfigError(f"{key} = {value!r}: a config holds numbers, strings and tuples.")
    try:
        return json.dumps(config.to_dict(), indent=2, allow_nan=False)
    except ValueError as error:
        raise ConfigError(f"A config with a number that is not finite: {error}") from error


def from_json(text: str) -> ConfigDict:
    """The locked config of `to_json`'s text; nothing in it is executed. Raises ConfigError."""

    def tuples(value):
        if isinstance(value, dict):
            return {key: tuples(part) for key, part in value.items()}
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    try:
        values = tuples(json.loads(text))
        if not isinstance(values, dict):
            raise ValueError(f"an object is expected, got {type(values).__name__}")
        for key, value in _LATER.items():
            section, name = key.split(".")
            if "sampling" in values:  # a whole config
                values.setdefault(section, {}).setdefault(name, value)
        return ConfigDict(values).lock()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"This is not a config's JSON: {error}") from error


# --- checking ---


def validate(config: ConfigDict, schema: ConfigDict | None = None) -> None:
    """Raises one ConfigError that lists every difference from `schema` and every contradiction."""
    problems = [] if schema is None else differences(config, schema)
    if schema is not None:  # the rules need every key in its type, so what lacks is filled in
        config, wrong = _repaired(config, schema)
        problems += [p for p in contradictions(config) if not any(_names(p, key) for key in wrong)]
    else:
        problems = contradictions(config)
    if problems:
        count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        raise ConfigError(f"the config {config.name!r} has {count}:\n  " + "\n  ".join(problems))


def differences(config: ConfigDict, schema: ConfigDict) -> list[str]:
    """Keys that the schema lacks, keys that the config lacks, and values of other types."""
    here, known = flat(config), flat(schema)
    problems = []
    for key in here.keys() - known.keys():
        hint = did_you_mean(nearest(key, known))
        problems.append(f"{key} is not a key of configs/base.py.{hint}")
    problems += [f"{key} is missing (configs/base.py has it)" for key in known.keys() - here.keys()]
    for key in here.keys() & known.keys():
        value, like = here[key], known[key]
        if not _same_type(value, like):
            problems.append(f"{key} = {value!r} is {_type(value)}, not {_type(like)} like {like!r}")
    return sorted(problems)


def _repaired(config: ConfigDict, schema: ConfigDict) -> tuple[ConfigDict, list[str]]:
    """The schema with what is usable in the config, and the keys that were not."""
    here = flat(config)
    known = flat(schema)
    wrong = [k for k in known if k not in here or not _same_type(here[k], known[k])]
    repaired = schema.copy_and_resolve_references()
    repaired.update_from_flattened_dict({k: here[k] for k in known if k not in wrong})
    return repaired, wrong


def _names(text: str, key: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", text) is not None


def _same_type(value: Any, like: Any) -> bool:
    if type(value) is not type(like):
        return False
    if not isinstance(value, tuple) or not like:
        return True
    kinds = (int, float) if isinstance(like[0], float) else (type(like[0]),)
    return all(type(part) in kinds for part in value)


def _type(value: Any) -> str:
    name = type(value).__name__
    if isinstance(value, tuple) and value:
        name += f" of {'/'.join(sorted({type(part).__name__ for part in value}))}"
    return name


def nearest(key: str, known: Sequence[str]) -> list[str]:
    """Keys of the same last name in other sections, else the one that is spelled most alike."""
    leaf = key.rsplit(".", 1)[-1]
    same = [k for k in known if k.rsplit(".", 1)[-1] == leaf]
    return difflib.get_close_matches(key, same, 2, 0) or difflib.get_close_matches(key, known, 1)
