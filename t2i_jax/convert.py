"""Models from one format to another: what launch/convert.py does.

    read     a checkpoint, our weights, a published pipeline, a diffusers export, or a part of a
             model in its publisher's format: a language model, an autoencoder, a CLIP
    write    our weights ('safetensors'), the published pipeline ('reference'), or a pipeline for
             current diffusers that brings its code ('diffusers')

Any that is read can be written as any that can hold it (t2i_jax/interop/stored.py). Tensors pass
one at a time.
"""

from collections.abc import Callable, Iterator
import dataclasses
import math
import re
from typing import Any

from etils import epath
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from t2i_jax import base_model, build, checkpoint, frozen
from t2i_jax.data.tokenizer import Tokenizer
from t2i_jax.errors import ConfigError, MissingError, UserError, users_files
from t2i_jax.interop import autoencoder, clip, diffusers, llm, native, published, stored
from t2i_jax.interop.directory import read_json
from t2i_jax.interop.mapping import Source, check
from t2i_jax.interop.stored import Files, Stored, expected_shapes, prefixed
from t2i_jax.progress import Progress

FORMATS: dict[str, Callable[[Stored, str], Files]] = {
    "safetensors": lambda model, dtype: native.files(model),
    "reference": published.files,
    "diffusers": diffusers.files,
}
_ELSEWHERE = "Known are checkpoints of a run, directories that launch/convert.py made, published "
_ELSEWHERE += "pipelines, and directories of a language model, a VAE or a CLIP text encoder"


# --- reading ---


def is_converted(path: epath.PathLike) -> bool:
    """Whether `path` is a directory of weights, and not one of a run."""
    directory = epath.Path(path)
    return any((directory / name).is_file() for name in (native.CARD, published.INDEX))


def open_model(
    path: epath.PathLike, *, averaged: bool = True, image_size: int | None = None
) -> Stored:
    """What is at `path`, whatever its format; no weight is read.

    `averaged` chooses between the two weights of a checkpoint, `image_size` is as of
    `published.open_pipeline`. Raises UserError that says what is there instead.
    """
    directory = epath.Path(path)
    if not directory.exists():
        raise MissingError(f"{path}: no such directory.")
    if not directory.is_dir():
        raise MissingError(f"{path} is a file: name the directory that it is in.")
    with users_files():
        try:
            model = _open(directory, averaged, image_size)
        except (TypeError, KeyError, AttributeError, ArithmeticError) as error:
            raise ConfigError(
                f"{directory} cannot be read: what its JSON or its checkpoint says does not make "
                f"sense ({type(error).__name__}: {error})."
            ) from error
    if not averaged and model.averaged:
        raise ConfigError(f"{path} has the averaged weights alone, and no raw ones.")
    return model


def _open(directory: epath.Path, averaged: bool, image_size: int | None) -> Stored:
    if native.is_native(directory):
        return native.open_native(directory)
    if (directory / published.INDEX).is_file():
        return _open_pipeline(directory, image_size)
    if (directory / "config.json").is_file() and not (directory / "checkpoints").exists():
        return _open_part(directory)
    return _open_checkpoint(directory, averaged)


def open_source(source: str, tokenizer: str | None = None, **options: Any) -> Stored:
    """What is to be converted: a directory, or a repository of the Hugging Face Hub.

    `tokenizer` is a directory to take the tokenizer from, `options` are as of `open_model`. Raises
    UserError as that, and where a repository cannot be fetched or a model has no tokenizer that can
    be read here.
    """
    fetched = not epath.Path(source).exists() and re.fullmatch(r"[\w.-]+(/[\w.-]+){1,2}", source)
    model = open_model(_fetch(source) if fetched else source, **options)
    if fetched and model.whole and not (model.where / native.CARD).exists():
        with model.config.unlocked():  # the directory is called after the snapshot
            model.config.name = source.split("/")[1]
    if tokenizer:
        model = dataclasses.replace(model, tokenizer=epath.Path(tokenizer))
    if model.whole or tokenizer:
        try:
            Tokenizer.load(model.tokenizer)
        except (FileNotFoundError, ValueError) as error:
            raise MissingError(f"{error} Or name one by --tokenizer=DIR.") from error
    return model


def _fetch(name: str) -> str:
    """The directory in the Hub's cache of a repository, or of a folder of one, that is a model.

    Its JSON comes first, and of its weights what that asks for.
    """
    owner, repository, *folders = name.split("/")
    inside = "".join(f"{folder}/" for folder in folders)
    root = _snapshot(f"{owner}/{repository}", [f"{inside}*.json"])
    if not (epath.Path(root) / inside / published.INDEX).is_file():
        wanted = [inside + pattern for pattern in _OF_A_PART]
        if folders[-1:] == ["text_encoder"]:  # CLIP's tokenizer lies beside it
            beside = inside.removesuffix("text_encoder/") + "tokenizer/"
            wanted += [beside + pattern for pattern in ("*.json", "*.txt")]
        _snapshot(f"{owner}/{repository}", wanted)
        return str(epath.Path(root) / inside)
    kind = read_json(epath.Path(root) / inside / published.INDEX).get("_class_name")
    if kind not in published.PIPELINES and kind != diffusers.CLASS:
        raise ConfigError(
            f"{name} is a {kind}, no pipeline of this family. Of its parts, name one: {name}/vae"
        )
    wanted = [f"{part}/{file}" for part in published.FOLDERS for file in _OF_A_PART]
    _snapshot(f"{owner}/{repository}", [inside + pattern for pattern in wanted])
    return str(epath.Path(root) / inside)


def _snapshot(repository: str, patterns: list[str]) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return snapshot_download(repository, allow_patterns=patterns)
    except (OSError, HfHubHTTPError, ValueError) as error:
        raise MissingError(
            f"{repository}: no such directory, and it cannot be fetched from the Hugging Face Hub "
            f"({type(error).__name__}: {error}). A gated model needs its licence accepted there, "
            "and HF_TOKEN in the environment or `hf auth login`."
        ) from error


_OF_A_PART = ("model*.safetensors", "diffusion_pytorch_model*.safetensors", "*.txt", "*.jinja")
_OF_A_PART += ("tokenizer.model",)


def _open_pipeline(directory: epath.Path, image_size: int | None) -> Stored:
    kind = read_json(directory / published.INDEX).get("_class_name")
    if kind in published.PIPELINES:
        return published.open_pipeline(directory, image_size)
    if kind == diffusers.CLASS:
        return diffusers.open_pipeline(directory)
    raise ValueError(f"{directory} is a {kind}, no pipeline of this family.{_parts_of(directory)}")


def _parts_of(directory: epath.Path) -> str:
    """A hint at the parts that are in a directory of another pipeline."""
    parts = [directory / name for name in ("vae", "text_encoder") if (directory / name).is_dir()]
    return f" Its parts are known: {', '.join(map(str, parts))}." if parts else ""


def _open_part(directory: epath.Path) -> Stored:
    theirs = read_json(directory / "config.json")
    kind = theirs.get("model_type") or theirs.get("_class_name")
    if kind == "AutoencoderKL":
        net, section, found = autoencoder.open_autoencoder(directory)
        weights = prefixed("autoencoder", found)
        config = {"autoencoder": section}
        return Stored(directory, "AutoencoderKL of diffusers", config, weights, net)
    if kind == "clip_text_model":
        encoder, found = clip.open_clip(directory)
        beside = directory.parent / "tokenizer"
        return Stored(
            directory,
            "CLIP text encoder of transformers",
            {"clip": clip.section(encoder)},
            prefixed("clip", found),
            clip_tokenizer=next((p for p in (directory, beside) if _has_tokenizer(p)), None),
        )
    if kind in llm.FAMILIES or kind == "paligemma":
        section = llm.section(theirs)
        return Stored(
            directory,
            f"language model of transformers ({kind})",
            {"llm": section},
            prefixed("llm", llm.open_llm(directory, section)),
            tokenizer=directory if _has_tokenizer(directory) else None,
        )
    if kind in ("FuseDiT", "DiT"):
        raise ValueError(f"{directory} is the transformer of a pipeline: name {directory.parent}.")
    raise ValueError(f"{directory} is a {kind!r}. {_ELSEWHERE}.")


def _has_tokenizer(directory: epath.Path) -> bool:
    return any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json"))


def _open_checkpoint(path: epath.Path, averaged: bool) -> Stored:
    try:
        workdir, step = checkpoint.find(path)
    except MissingError as error:
        hint = _parts_of(path)
        raise MissingError(f"{path} is no model.{hint} {_ELSEWHERE}.\n{error}") from error
    which = "ema" if averaged else "params"
    with checkpoint.Checkpoints(workdir) as saved:
        config = saved.config(step).copy_and_resolve_references().unlock()
        if config.lora.rank:
            base, scale = open_base(config, workdir), build.lora_scale(config)
            weights = base_model.merge(base, saved.arrays(step, which), scale)
            config.lora.rank = 0  # what is made of the two is an ordinary model
        else:
            weights = saved.sources(step, which)
    parts = frozen.open_parts(config, workdir)
    weights |= parts.weights
    names = ["dit", *(["autoencoder"] if parts.network else []), "clip"]
    expected = expected_shapes(config, parts.network, names[: 3 if config.dit.pooled_width else -1])
    check(f"{path} (step {step})", weights, expected)
    native.point_here(config)  # the paths are of this machine
    config.data.path = "::".join(epath.Path(p).name for p in config.data.path.split("::"))
    return Stored(
        where=path,
        layout="checkpoint",
        config=config.lock(),
        weights=weights,
        autoencoder=parts.network,
        tokenizer=parts.tokenizer,
        clip_tokenizer=parts.clip_tokenizer,
        step=step,
        averaged=averaged,
    )


def open_base(config: ConfigDict, workdir: epath.PathLike, *, new: bool = False) -> Stored:
    """The model that the low-rank factors of a run are for, as `base_model.watch` has it."""
    base_model.require(config.weights.start)
    return base_model.watch(open_model(config.weights.start), workdir, new=new)


# --- writing ---


def write(model: Stored, out: epath.PathLike, layout: str, dtype: str) -> epath.Path:
    """Writes a model in one of FORMATS, with a progress bar; all of it or nothing.

    Raises UserError where the format cannot hold the model, a weight is missing or is no number, or
    there is something at `out`.
    """
    stored.free(epath.Path(out))
    with users_files():
        if not model.whole and layout != "safetensors":
            raise ConfigError(f"{model.where} is a part of a model, and {layout} holds whole ones.")
        files = FORMATS[layout](model, dtype)
        done, total = 0, files.size(dtype)

        with Progress(max(-(-total // _MEGABYTE), 1), name="writing", unit="MB") as bar:

            def advance(count: int) -> None:
                nonlocal done
                before, done = done, done + count
                if before // _MEGABYTE != done // _MEGABYTE or done == total:
                    bar.update(-(-done // _MEGABYTE))

            try:
                return stored.write(files, out, dtype, advance)
            except FileNotFoundError:
                raise
            except OSError as error:  # the disk is full, or not ours to write to
                raise UserError(
                    f"{out} cannot be written: {error}. Nothing of it is left."
                ) from error


_MEGABYTE = 1_000_000


# --- looking ---


def describe(model: Stored) -> str:
    """One screen of text: what it is, its parts, their sizes and dtypes."""
    averaged = {True: "EMA", False: "raw", None: "not said which"}[model.averaged]
    lines = [("model", f"{model.layout} in {model.where}")]
    if model.whole:
        step = "not said" if model.step is None else model.step
        lines.append(("trained", f"step {step}, weights {averaged}"))
        lines += list(_architecture(model.config))
    for part in model.parts:
        found = model.part(part)
        size = sum(int(np.prod(s.shape)) for s in found.values())
        kinds = sorted({str(jnp.dtype(s.dtype)) for s in found.values()})
        lines.append((part, f"{size:,} parameters in {len(found)} arrays, {', '.join(kinds)}"))
        largest = max(found, key=lambda p: int(np.prod(found[p].shape)))
        lines.append(("", f"the largest is {part}/{largest} {found[largest].shape}"))
    for name, path in (("tokenizer", model.tokenizer), ("CLIP's", model.clip_tokenizer)):
        if path is not None:
            lines.append((name, f"{path}"))
    return "\n".join(f"{name:>11}  {text}" for name, text in lines)


def _architecture(config: Any) -> Iterator[tuple[str, str]]:
    c = config
    yield "config", f"{c.name}: {c.data.image_size} px, {c.data.max_text_tokens} tokens of text"
    table = " and a table" if c.dit.table_size else ""
    yield (
        "",
        f"{c.memory.source} source, {c.dit.attention} attention; positions {c.dit.positions}"
        f"{table}; conditioning {c.dit.conditioning}",
    )
    yield "", f"DiT {c.dit.num_layers} x {c.dit.width}, LLM {c.llm.num_layers} x {c.llm.width}"


def compare(a: epath.PathLike, b: epath.PathLike, **options: Any) -> list[str]:
    """`differences` of two directories, with a progress bar; `options` as of `open_model`."""
    one, other = open_model(a, **options), open_model(b, **options)
    done, total = 0, sum(_millions(source) for source in one.weights.values())
    with Progress(total, name="comparing", unit="M numbers") as bar, users_files():

        def advance(source: Source) -> None:
            nonlocal done
            done += _millions(source)
            bar.update(done)

        return differences(one, other, advance)


# What of the section `data` a drawing depends on.
_OF_PROMPTS = (
    "instruction",
    "chat_template",
    "add_generation_prompt",
    "max_text_tokens",
    "image_size",
)


def _millions(source: Source) -> int:
    return -(-math.prod(source.shape) // 1_000_000)


def differences(
    a: Stored, b: Stored, progress: Callable[[Source], None] | None = None
) -> list[str]:
    """What makes them two models: one line a tensor or key that differs; [] where they are one.

    Values are compared, whatever their dtypes. `progress` is called after each tensor.
    """
    lines = [f"{p} is in {a.where} alone" for p in a.weights if p not in b.weights]
    lines += [f"{p} is in {b.where} alone" for p in b.weights if p not in a.weights]
    for name in ("llm", "memory", "dit", "autoencoder", "clip", "flow", "data"):
        one, other = (dict(m.config.get(name, {})) for m in (a, b))
        lines += [
            f"{name}.{key} = {one[key]!r} and {other[key]!r}"
            for key in sorted(one.keys() & other.keys())
            if one[key] != other[key]
            and key not in ("unroll", "remat", "tile", "query_scalar", "time_mean", "time_std")
            and (name != "data" or key in _OF_PROMPTS)
        ]
    for path in (path for path in a.weights if path in b.weights):
        if line := _difference(path, a.weights[path], b.weights[path]):
            lines.append(line)
        if progress:
            progress(a.weights[path])
    return lines


def _difference(path: str, a: Any, b: Any) -> str | None:
    if a.shape != b.shape:
        return f"{path} is {a.shape} and {b.shape}"
    layers = range(a.shape[0]) if "{L}" in native.flat_name(path) else [None]
    differs, worst = False, 0.0
    for layer in layers:
        one, other = (np.ascontiguousarray(x.read(layer)).reshape(-1) for x in (a, b))
        for i in range(0, one.size, _BLOCK):  # in float32 a bfloat16 embedding is twice itself
            part = one[i : i + _BLOCK], other[i : i + _BLOCK]
            if part[0].dtype == part[1].dtype and _same_bits(*part):
                continue
            x, y = (p.astype(np.float32) for p in part)
            if not np.array_equal(x, y, equal_nan=True):
                differs, worst = True, np.fmax(worst, np.nanmax(np.abs(x - y), initial=0.0))
    return f"{path} differs by up to {worst:.3g}" if differs else None


_BLOCK = 1 << 24  # elements


def _same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    bits = f"u{one.dtype.itemsize}"
    return np.array_equal(one.view(bits), other.view(bits))
