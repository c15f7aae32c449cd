"""Makes the parts of a suite: language models and a CLIP, as directories that configs name.

<workdir>/parts/<name> is there when a part is complete; what was begun is begun anew.
"""

import shutil

from etils import epath
import jax

from t2i_jax import checkpoint, convert, frozen, sharding
from t2i_jax.data.tokenizer import Tokenizer
from t2i_jax.interop.stored import Stored, prefixed
from t2i_jax.progress import Progress
from t2i_jax.stored_arrays import tree_sources
from t2i_jax.study.parts import Part
from t2i_jax.training import contrastive, loop
from t2i_jax.training.guard import Guard


def make(part: Part, out: epath.PathLike) -> None:
    """Writes a part to the directory `out`, where nothing is."""
    out = epath.Path(out)
    scratch = out.parent / f"{out.name}.making"
    if scratch.exists():
        shutil.rmtree(scratch)
    scratch.mkdir(parents=True)
    config, source = part.config, loop.open_data(_without_weights(part.config))[0]
    loop.make_tokenizer(config, scratch, source)
    kinds = {"llm": _language_model, "clip": _clip}
    convert.write(kinds[part.kind](config, scratch, source), out, "safetensors", "float32")
    shutil.rmtree(scratch)


def _without_weights(config):
    """For opening the data alone."""
    config = config.copy_and_resolve_references().unlock()
    config.weights.update(llm="", tokenizer="", clip="", start="")
    config.dit.pooled_width = 0
    return config


def _language_model(config, scratch, source) -> Stored:
    mesh = sharding.make_mesh(**config.mesh)
    with Guard(config, scratch) as guard, jax.set_mesh(mesh):
        loop.make_language_model(config, scratch, mesh, source, guard)
    weights = prefixed("llm", tree_sources(frozen.llm_path(scratch)))
    tokenizer = frozen.tokenizer_path(config, scratch)
    return Stored(scratch, "language model", config, weights, tokenizer=tokenizer)


def _clip(config, scratch, source) -> Stored:
    path = frozen.tokenizer_path(config, scratch)
    steps = contrastive.train_clip(
        config.clip, source, Tokenizer.load(path), config.data.image_size, config.seed
    )
    total = contrastive.STEPS
    with Progress(total, images=contrastive.BATCH, name="CLIP", unit="pairs") as bar:
        for i, (trained, loss) in enumerate(steps, 1):
            params = trained
            if i % 10 == 0 or i == total:
                bar.update(i, loss=loss)
    checkpoint.save_tree(scratch / "clip", params)
    weights = prefixed("clip", tree_sources(scratch / "clip"))
    return Stored(scratch, "CLIP text encoder", config, weights, clip_tokenizer=path)
