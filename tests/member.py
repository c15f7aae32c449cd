"""One process of several: what it holds of batches and of a checkpoint, as digests; for a test.

    python tests/member.py WORKDIR OUT --coordinator=... --num_processes=N --process_id=I

Writes OUT/<I>.json: {"rows": {mesh: {step: {row: digest}}}, "tells": {mesh: ...}, "state": {...},
"told": what it hears of a process that fails, "features": of items, which of them it prepared, and
what it hears of one that cannot be}.
"""

import hashlib
import json
import pathlib
import sys

from absl import app
import jax
import numpy as np

from t2i_jax import checkpoint, cli, distributed, frozen, sharding
from t2i_jax.data import loader, sources
from t2i_jax.errors import UserError
from t2i_jax.evaluation.features import Extractor
from t2i_jax.training import program

STEPS = range(3)
SIZE = 8  # rows of a batch


def digest(*arrays):
    text = hashlib.blake2b(digest_size=8)
    for array in arrays:
        text.update(np.ascontiguousarray(array).tobytes())
    return text.hexdigest()


def meshes():
    """Name -> a mesh of the four devices; of the last one no host's rows are one run."""
    devices = jax.devices()
    crossed = [devices[i] for i in (0, 2, 1, 3)]
    return {
        "fsdp": sharding.make_mesh(),
        "data, fsdp": sharding.make_mesh(2, 2, 1),
        "fsdp, tensor": sharding.make_mesh(1, 2, 2),
        "tensor": sharding.make_mesh(1, 1, 4),
        "crossed": sharding.make_mesh(devices=crossed),
    }


def row_digests(config, workdir, mesh):
    """{step: {row: digest of its arrays}} of what this process's devices hold."""
    prompts = frozen.make_prompts(config, frozen.tokenizer_path(config, workdir), None)
    source = sources.make_source(config, "train")
    rows = sharding.local_rows(mesh, SIZE)
    found = {}
    with loader.Loader(source, prompts, config.data, SIZE, config.seed, rows) as batches:
        for step in STEPS:
            arrays = sharding.shard_batch(batches.batch(step).arrays, mesh)
            assert {len(x) for x in arrays.values()} == {SIZE}
            held = {}
            for name in sorted(arrays):
                for shard in arrays[name].addressable_shards:
                    for row, x in zip(range(SIZE)[shard.index[0]], shard.data, strict=True):
                        held.setdefault(row, {})[name] = np.asarray(x)
            found[step] = {r: digest(*(x[n] for n in sorted(x))) for r, x in held.items()}
    return found


def state_digests(config, saved, step, mesh):
    """{path: [[slices, digest]]} of the parts of the state on this process's devices."""
    restored = saved.restore(step, program.abstract_state(config, mesh)[0])
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(restored):
        parts = [(s.index, s.data) for s in x.addressable_shards]
        found[jax.tree_util.keystr(path)] = [
            [[[*i.indices(n)[:2]] for i, n in zip(index, x.shape, strict=True)], digest(data)]
            for index, data in parts
        ]
    return found


def hears_of_a_failure():
    """What this process is told where the last one fails alone."""
    try:
        with distributed.together():
            if jax.process_index() == jax.process_count() - 1:
                raise FileNotFoundError("no such shard")
    except UserError as error:
        return str(error)
    except FileNotFoundError as error:
        return f"raised {error}"
    return ""


def features_of_items():
    """[[their features], [the items that this process prepared], what it is told of a bad one]."""
    mine = []

    def prepare(item):
        if item == 19:
            raise ValueError("a bad picture")
        mine.append(item)
        return np.full(2, item, np.int32)

    reads = jax.ShapeDtypeStruct((2,), np.int32)
    mesh = sharding.make_mesh()
    extractor = Extractor(prepare, lambda k, x: k * x, 3, mesh, reads, batch_size=SIZE)
    found = extractor(range(11))[:, 0].tolist()
    try:
        extractor(range(11, 22))
    except (ValueError, UserError) as error:
        return [found, sorted(i for i in mine if i < 11), str(error)]


def main(argv):
    workdir, out = map(pathlib.Path, argv[1:])
    cli.start_processes({"workdir": str(workdir)})
    with checkpoint.Checkpoints(workdir) as saved:
        step = saved.steps()[-1]
        config = saved.config(step)
        found = {
            "rows": {name: row_digests(config, workdir, mesh) for name, mesh in meshes().items()},
            "tells": {name: sharding.tells_rows(mesh) for name, mesh in meshes().items()},
            "state": state_digests(config, saved, step, sharding.make_mesh()),
            "told": hears_of_a_failure(),
            "features": features_of_items(),
        }
    (out / f"{jax.process_index()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    cli.define_process_flags()
    app.run(main, argv=sys.argv)
