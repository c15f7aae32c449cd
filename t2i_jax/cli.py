"""What launch scripts share: flags parsed, the config checked, one clear message where they fail.

CONFIG = config_flags.DEFINE_config_file("config")  # no default: it would be read too early
if __name__ == "__main__":
    cli.run(main)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import os
import re
import sys
from typing import Any, NoReturn

from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from t2i_jax import config as configs
from t2i_jax import xla_flags
from t2i_jax.errors import ConfigError, UserError

_PARSERS = {bool: flags.BooleanParser(), int: flags.IntegerParser(), float: flags.FloatParser()}


def run(main: Callable[[Sequence[str]], Any], *, commands: bool = False) -> NoReturn:
    """`absl.app.run`, but a UserError ends the program with its message alone.

    The status is that of the error: 2 for a ConfigError, 1 for most others. With `commands`, words
    that are no flags are left to `main`.
    """

    def parse(argv: Sequence[str]) -> list[str]:
        with _reported():
            return parse_flags(argv, commands=commands)

    def guarded(argv: Sequence[str]) -> Any:
        if not flags.FLAGS["verbosity"].present:  # --verbosity=0 shows what libraries say
            logging.set_verbosity(logging.WARNING)
        with _reported():
            return main(argv)

    xla_flags.apply(os.environ)  # before the first use of a device
    app.run(guarded, flags_parser=parse)


def parse_flags(argv: Sequence[str], *, commands: bool = False) -> list[str]:
    """Parses the command line into absl's FLAGS; config flags are checked against configs/base.py.

    Returns the program's name and, with `commands`, the words that are no flags.

    Raises ConfigError that says what to type instead.
    """
    names = [name for name in flags.FLAGS if config_flags.is_config_flag(flags.FLAGS[name])]
    problems = [problem for name in names for problem in _override_problems(name, argv)]
    if problems:
        raise ConfigError("\n".join(problems))
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        missing = re.search(r"Flag (--\S+) must have a value other than None", str(error))
        text = f"{missing[1]}=... is required." if missing else str(error)
        raise ConfigError(f"{text} (--help lists all flags.)") from error
    if rest[1:] and not commands:
        raise ConfigError(f"what is {' '.join(rest[1:])!r}? Flags look like --name=value.")
    for name in names:
        if flags.FLAGS[name].value is not None:
            configs.validate(flags.FLAGS[name].value, configs.base())
    return rest


def _override_problems(name: str, argv: Sequence[str]) -> Iterator[str]:
    """What is wrong with `--config=path --config.section.key=value ...`; its file must load."""
    arguments = list(_arguments(argv))
    paths = [value for flag, value, _ in arguments if flag == name]
    overrides = [(f, value, raw) for f, value, raw in arguments if f.startswith(f"{name}.")]
    if not paths or not paths[-1]:
        for _, _, raw in overrides:
            yield f"{raw} changes a config, but there is none: --{name}=configs/... comes first."
        return
    config = configs.read(paths[-1])
    known = configs.flat(config)
    for flag, value, raw in overrides:
        key = flag.removeprefix(f"{name}.")
        if key in known:
            yield from _value_problems(key, known[key], value, raw, paths[-1])
        elif isinstance(config.get(key), ConfigDict):
            keys = ", ".join(f"--{name}.{key}.{part}" for part in config[key])
            yield f"{raw}: {key} is a section of {paths[-1]}; set its keys: {keys}."
        else:
            hint = configs.did_you_mean([f"--{name}.{k}" for k in configs.nearest(key, known)])
            yield f"{raw}: {paths[-1]} has no key {key}.{hint}"


def _value_problems(key: str, now: Any, value: str | None, raw: str, path: str) -> Iterator[str]:
    if value is None:
        if not isinstance(now, bool):  # --config.dit.qk_norm alone is true
            yield f"{raw} has no value; {path} has {key} = {now!r}."
    elif type(now) in _PARSERS:
        try:
            _PARSERS[type(now)].parse(value)
        except (ValueError, TypeError):
            kind = type(now).__name__
            yield f"{raw}: {key} is of type {kind} ({now!r} in {path}), {value!r} is not."


def _arguments(argv: Sequence[str]) -> Iterator[tuple[str, str | None, str]]:
    """(flag without dashes, value or None, as typed) of every flag; '--flag value' is one too."""
    for i, argument in enumerate(argv[1:], 1):
        if argument == "--":
            return
        match = re.match(r"--?([A-Za-z]\S*?)(=|$)", argument)
        if not match:
            continue
        flag, value = match[1], argument[match.end() :] if match[2] else None
        if value is None and i + 1 < len(argv) and not argv[i + 1].startswith("-"):
            value = argv[i + 1]
        if flag.startswith("no") and flag[2:].partition(".")[0] in flags.FLAGS:
            flag, value = flag[2:], None  # --noconfig.dit.qk_norm
        yield flag, value, argument


def check_command(command: str, words: Sequence[str], known: Mapping[str, Sequence[str]]) -> None:
    """Raises ConfigError unless `command` is known and has as many words as it takes."""
    usage = ", ".join(" ".join([name, *takes]) for name, takes in known.items())
    if command not in known:
        what = f"what is {command!r}?" if command else "which command?"
        raise ConfigError(f"{what} Known are {usage} (--help).")
    if len(words) != len(known[command]):
        takes = " ".join([command, *known[command]])
        raise ConfigError(
            f"the command is '{takes}', not '{' '.join([command, *words])}' (--help)."
        )


def define_process_flags() -> None:
    """Defines what `start_processes` reads: for scripts that several processes can run as one."""
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, of several (docs/tpu.md).")
    flags.DEFINE_integer("num_processes", None, "Processes of the run; 1: this one, alone.", 1)
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", 0)
    flags.DEFINE_float("start_timeout", 300.0, "Seconds to wait for the other processes.", 1.0)


def define_sampling_flags() -> None:
    """Defines what `sampling_options` reads: how images are drawn, where not as the config says."""
    flags.DEFINE_integer("height", None, "Pixels; default: of the training images.", 1)
    flags.DEFINE_integer("width", None, "Likewise.", 1)
    flags.DEFINE_integer("steps", None, "Sampling steps; default: the config's.", 1)
    flags.DEFINE_string("solver", None, "euler, heun, midpoint, dpmpp_2m, unipc or ancestral.")
    flags.DEFINE_float("guidance_scale", None, "1: without; default: the config's.", 0)
    flags.DEFINE_string("guidance_method", None, "plain, rescaled, apg or cfg-zero.")
    flags.DEFINE_list("guidance_interval", None, "Noise levels that are guided, as 0.2,0.8.")
    flags.DEFINE_float("shift", None, "Of noise levels; default: by the size of the image.")


def sampling_options() -> dict[str, Any]:
    """Arguments of `options.resolve`, of the flags that were given. Raises ConfigError."""
    values = flags.FLAGS
    names = ("height", "width", "steps", "solver", "guidance_scale", "shift")
    found = {name: values[name].value for name in names if values[name].value is not None}
    if values.guidance_method is not None:
        found["guidance"] = values.guidance_method
    if values.guidance_interval is not None:
        try:
            found["guidance_interval"] = [float(level) for level in values.guidance_interval]
        except ValueError as error:
            raise ConfigError(f"--guidance_interval: two numbers, as 0.2,0.8 ({error}).") from error
    return found


def start_processes(same: Mapping[str, Any]) -> None:
    """Before anything touches a device: meets the other processes, if there are (distributed.py).

    After it compiled programs are kept (compilation_cache.py). `same` is what must be equal on all
    of them, besides the versions. Raises UserError.
    """
    from t2i_jax import compilation_cache, distributed

    values = flags.FLAGS
    distributed.start(
        same,
        coordinator=values.coordinator,
        num_processes=values.num_processes,
        process_id=values.process_id,
        timeout=values.start_timeout,
    )
    compilation_cache.enable()


def require(**values: Any) -> None:
    """Raises ConfigError naming the flags that are not given."""
    absent = [f"--{name}=..." for name, value in values.items() if not value]
    if absent:
        raise ConfigError(f"{' and '.join(absent)} must be given (--help lists all flags).")


def refuse(*names: str, where: str) -> None:
    """Raises ConfigError for flags that are given but are not read there."""
    given = [f"--{name}" for name in names if flags.FLAGS[name].present]
    if given:
        raise ConfigError(f"{' and '.join(given)} does not go with {where} (--help).")


def config_arguments(name: str, argv: Sequence[str]) -> list[tuple[str, str]]:
    """(flag, value) of `--config=path --config.section.key=value ...`, however they are typed."""
    found = [one for one in _arguments(argv) if one[0].partition(".")[0] == name]
    return [
        (flag, "false" if raw.lstrip("-").startswith("no") else "true" if value is None else value)
        for flag, value, raw in found
    ]


def output(value: str, suffix: str) -> epath.Path:
    """The path of --out, its folder made. Raises ConfigError where no such file can be written."""
    path = epath.Path(value)
    if path.suffix != suffix or path.is_dir():
        raise ConfigError(f"--out={value} must be a file that ends in {suffix}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out={value}: {error}.") from error
    return path


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        _end(error, error.exit_code)
    except ImportError as error:
        if "gcsfs" not in str(error):
            raise
        _end(f"Paths like gs://... need a package: pip install -e '.[gcs]' ({error}).", 2)


def _end(message: object, status: int) -> NoReturn:
    print(f"{sys.argv[0]}: {message}", file=sys.stderr)
    sys.exit(status)
