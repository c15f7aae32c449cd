"""A working directory belongs to one config, and to the data that its run began on."""

import json
import re
from typing import Any

from etils import epath
import jax
from ml_collections import ConfigDict

from t2i_jax import config as configs
from t2i_jax.data import sources
from t2i_jax.errors import ConfigError

# What a run may change when it is started again in its working directory; and train.steps, where
# the schedule does not end with it.
_MAY_CHANGE = (
    "name",
    "weights.",
    "autoencoder.tile",
    "data.path",
    "data.index_dir",
    "data.max_bad_rate",
    "data.num_threads",
    "data.num_workers",
    "data.prefetch",
    "train.attention",
    "train.log_every",
    "train.step_deadline",
    "train.pause_deadline",
    "train.block_norms",
    "train.wandb",
    "profile.",
    "checkpoint.",
    "validation.",
    "sampling.",
    "evaluation.",
    "mesh.",
)


def claim(config: ConfigDict, workdir: epath.Path, source: sources.Source) -> None:
    """Makes a working directory that of `config`, in <workdir>/config.json, and of its data.

    Raises ConfigError where it holds a run of another config, but for keys that a resumed run may
    change, or on other training samples: a position would mean another sample.
    """
    data = {"samples": len(source), "fingerprint": source.fingerprint}
    files = {"config.json": configs.to_json(config), "data.json": json.dumps(data)}
    made = any((workdir / part).exists() for part in ("tokenizer", "llm", "checkpoints"))
    if made and (workdir / "config.json").exists():
        before = configs.from_json((workdir / "config.json").read_text())
        if changed := _changes(before, config):
            raise ConfigError(
                f"{workdir} holds a run of another config: {'; '.join(changed)}. "
                "Set these back, or give another --workdir."
            )
    if made and (workdir / "data.json").exists():
        was = json.loads((workdir / "data.json").read_text())
        if was != data:
            same = was["samples"] == data["samples"]
            raise ConfigError(
                f"{workdir} holds a run on {was['samples']} training samples, now there are "
                f"{'others, as many' if same else data['samples']}: which were held out, and which "
                "came when, would differ. Give the data as it was, or another --workdir."
            )
    if jax.process_index() == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                new = workdir / f"{name}.new"
                new.write_text(text)
                new.replace(workdir / name)
        except OSError as error:
            raise ConfigError(f"--workdir={workdir} cannot be written: {error}.") from error


def _changes(before: ConfigDict, now: ConfigDict) -> list[str]:
    """What a run that is resumed must not change, and `now` does."""
    was, wanted = (_placeless(configs.flat(config)) for config in (before, now))
    free = _MAY_CHANGE
    if now.optimizer.schedule == "constant":
        free += ("train.steps",)
    return [
        f"{key} = {wanted.get(key)!r}, was {was.get(key)!r}"
        for key in sorted(was.keys() | wanted.keys())
        if was.get(key) != wanted.get(key)
        # Files may move; weights that the run makes itself, or does not, are another model.
        and not (
            key.startswith(free)
            and (not key.startswith("weights.") or bool(was.get(key)) == bool(wanted.get(key)))
        )
    ]


def _placeless(values: dict[str, Any]) -> dict[str, Any]:
    """A flat config whose mixture does not say where its files are."""
    mixture = (re.sub(r"(^|\s)path=(\S*)", r"\1", entry) for entry in values["data.mixture"])
    return values | {"data.mixture": tuple(mixture)}
