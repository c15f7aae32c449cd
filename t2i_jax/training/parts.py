"""Everything that a run is made of."""

from typing import NamedTuple

from etils import epath
import jax
from ml_collections import ConfigDict

from t2i_jax.data import loader, sources
from t2i_jax.data.samples import Fault
from t2i_jax.pipeline import Pipeline
from t2i_jax.training import program, state


class Parts(NamedTuple):
    """What training works with, assembled."""

    config: ConfigDict
    workdir: epath.Path
    mesh: jax.sharding.Mesh
    pipeline: Pipeline  # model, autoencoder, tokenizers and frozen parameters
    train_loader: loader.Loader
    validation_source: sources.Source
    damage: tuple[Fault, ...]  # of the files that the data is in
    state: state.TrainState
    programs: program.Program
