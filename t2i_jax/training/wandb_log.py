"""Metrics to Weights & Biases as well: `train.wandb` names the project.

The run's id is in <workdir>/wandb.json, so that a run that is started again goes on as the same
one. Steps that are made again are told again, with the same numbers: the x axis is our own step.
WANDB_MODE, WANDB_API_KEY, WANDB_ENTITY and so on are read by wandb itself.
"""

from collections.abc import Mapping
import importlib.util
import json
import os
import secrets
import tempfile
from typing import Any

from etils import epath
from ml_collections import ConfigDict
import numpy as np

from t2i_jax import config as configs
from t2i_jax.errors import MissingError, UserError

FILE = "wandb.json"


def check(project: str) -> None:
    """Raises MissingError where metrics are to go there, and wandb is not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        raise MissingError(
            f"train.wandb = {project!r}, but wandb is not installed: pip install wandb, or "
            "--config.train.wandb= to do without."
        )


class WandbLog:
    """One run of a project; one process writes. Raises UserError where wandb refuses to start."""

    def __init__(self, config: ConfigDict, workdir: epath.PathLike):
        import wandb  # an extra, which most runs do without

        project, workdir = config.train.wandb, epath.Path(workdir)
        self._image = wandb.Image
        # Its own files; where the working directory is remote, they are only on their way.
        local = tempfile.gettempdir() if "://" in os.fspath(workdir) else os.fspath(workdir)
        try:
            self._run = wandb.init(
                project=project,
                id=_run_id(workdir / FILE, project),
                resume="allow",
                name=config.name,
                config=configs.flat(config),
                allow_val_change=True,
                dir=local,
            )
        except wandb.Error as error:
            raise UserError(
                f"train.wandb = {project!r}: {error} Log in (wandb login), set WANDB_MODE=offline "
                "to send it later (wandb sync), or --config.train.wandb= to do without."
            ) from error
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """A uint8 (H, W, 3) image."""
        self._run.log({"step": step, name: self._image(image)})

    def close(self, *, finished: bool) -> None:
        """Sends what is pending; a run that is not `finished` is shown as failed until it goes on.

        A second call does nothing.
        """
        if self._run is not None:
            self._run.finish(exit_code=0 if finished else 1)
        self._run = None


def _run_id(file: epath.Path, project: str) -> str:
    """The id of the run in `project`, kept in `file`; of another project another one."""
    if file.exists():
        kept: dict[str, Any] = json.loads(file.read_text())
        if kept["project"] == project:
            return kept["id"]
    made = secrets.token_hex(4)
    file.write_text(json.dumps({"project": project, "id": made}))
    return made
