"""What the runs of a suite share and do not train: which parts, under which names.

A suite whose base has weights.llm = '' makes its language models itself, from the captions of its
data: one for every different 'llm' and 'pretrain' section among the rows, and a CLIP for every
different 'clip' section that is used. A row with fewer layers takes the first ones of the base's.
Parts lie in <workdir>/parts/<name>, and the name says what they are made from.
"""

from collections.abc import Iterable
import dataclasses
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from t2i_jax import config as configs
from t2i_jax.errors import ConfigError
from t2i_jax.evaluation.benchmarks import WORLDS
from t2i_jax.study.digests import digest

FOLDER = "parts"
CONFIG = "study.json"  # in a run's directory: its config


@dataclasses.dataclass(frozen=True)
class Part:
    """A part to be made: 'llm' or 'clip', and the config that it is made by."""

    kind: str
    config: ConfigDict

    @property
    def name(self) -> str:
        return f"{self.kind}-{digest(_decides(self.kind, self.config))}"


def _decides(kind: str, config: ConfigDict) -> dict[str, Any]:
    """The values that decide what a part is."""
    both = ("pretrain.", "data.", "train.dtype", "train.frozen_dtype", "weights.tokenizer")
    sections = {"llm": ("llm.", *both), "clip": ("clip.", *both)}
    skipped = ("llm.unroll", "data.num_threads", "data.num_workers", "data.prefetch")
    if kind == "clip":
        skipped += ("pretrain.steps", "pretrain.batch_size", "pretrain.learning_rate")
    values = configs.flat(config)
    kept = {k: v for k, v in values.items() if k.startswith(sections[kind]) and k not in skipped}
    return kept | {"seed": config.seed}


def point(config: ConfigDict, base: ConfigDict) -> list[Part]:
    """Sets the paths of weights in an unlocked `config` to those of parts, and returns these.

    The paths are relative to the suite's working directory. The seed of parts is the base's.
    Raises ConfigError where a CLIP would have to be made of other data than a built-in world's.
    """
    found, given = [], config.copy_and_resolve_references()
    if not config.weights.llm:
        maker = _maker(given, base)
        maker.llm.num_layers = max(config.llm.num_layers, base.llm.num_layers)
        found.append(Part("llm", maker))
        config.weights.llm = f"{FOLDER}/{found[-1].name}"
        config.weights.tokenizer = config.weights.tokenizer or config.weights.llm
    if config.dit.pooled_width and not config.weights.clip:
        if config.data.source not in WORLDS:
            raise ConfigError(
                f"weights.clip = '': one is made of the pictures of {' or '.join(WORLDS)} alone; "
                f"of data.source = {config.data.source!r} name a directory."
            )
        found.append(Part("clip", _maker(given, base)))
        config.weights.clip = f"{FOLDER}/{found[-1].name}"
    return found


def _maker(config: ConfigDict, base: ConfigDict) -> ConfigDict:
    maker = config.copy_and_resolve_references().unlock()
    maker.seed = base.seed
    maker.data.shuffle_captions = False  # the control is the DiT's alone
    return maker


def unique(parts: Iterable[Part]) -> list[Part]:
    """Each part once, in order."""
    return list({part.name: part for part in parts}.values())


def read(folder: epath.PathLike) -> ConfigDict:
    """The config of a run's directory, paths of parts relative to the suite's."""
    return configs.from_json((epath.Path(folder) / CONFIG).read_text())


def located(config: ConfigDict, root: epath.PathLike) -> ConfigDict:
    """The config with its parts where they are below the suite's directory `root`."""
    found = config.copy_and_resolve_references().unlock()
    for key, path in config.weights.items():
        if path.startswith(f"{FOLDER}/"):
            found.weights[key] = str(epath.Path(root) / path)
    return found.lock()
