"""How drawn pictures compare with real ones as sets, and with their prompts.

FID (clean-fid's definition) and KID of Inception's features, CMMD and the CLIP score of CLIP's
embeddings: distances.py has the mathematics, preprocess.py what is done to a picture before. What
moves FID most is how pictures reach the network, so a report says it (`PIPELINE`).

Two benchmarks are laid out here: MJHQ-30K (Li et al., arXiv 2402.17245; `<category>/<id>.png` for
each prompt of its meta_data.json) and captions of COCO or any other file of captions.
"""

from collections.abc import Mapping, Sequence
import functools
import json
from typing import Any, NamedTuple

from etils import epath
import jax
import numpy as np

from t2i_jax.errors import ConfigError, MissingError
from t2i_jax.evaluation import distances, features
from t2i_jax.evaluation.statistics import Statistics, read_arrays
from t2i_jax.progress import Progress

PIPELINE = (
    "Drawn pictures are rounded to 8 bits and stored as PNG, real ones are read as they are. "
    "FID and KID: resized to 299 x 299 without keeping the aspect, by Pillow's bicubic filter with "
    "antialiasing, channel by channel in float32, clipped and not rounded (clean-fid); (x - 128) / "
    "128; Inception-v3 of 2015-12-05 with TensorFlow's poolings; pool features (2048) in float32, "
    "their mean and unbiased covariance in float64. CLIP: shorter side resized by Pillow's bicubic "
    "filter in 8 bits, centre crop, the mean and deviation of its preprocessor_config.json."
)
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_LEAST = 2048  # pictures below which Inception's covariance is singular, and FID much too high
_SUBSET = 1000  # of KID
METADATA = "meta_data.json of huggingface.co/datasets/playgroundai/MJHQ-30K"


class Networks(NamedTuple):
    """What pictures and prompts are looked at with; None: not."""

    inception: features.Extractor | None
    clip: tuple[features.Extractor, features.Extractor] | None  # pictures, prompts

    @classmethod
    def load(cls, inception: str, clip: str) -> "Networks":
        """From files; '' for none. Raises ConfigError where they cannot be read."""
        return cls(
            features.inception(inception) if inception else None,
            features.clip(clip) if clip else None,
        )


@functools.lru_cache(maxsize=1)
def load(inception: str, clip: str, path: str) -> tuple[Networks, "Seen", list[epath.Path]]:
    """The networks, and what they see of the `reference` at `path` ('': nothing), once for all."""
    networks = Networks.load(inception, clip)
    return (networks, *reference(networks, path)) if path else (networks, Seen(), [])


class Seen(NamedTuple):
    """What the networks see of some pictures."""

    statistics: Statistics | None = None
    inception_ND: np.ndarray | None = None
    clip_NP: np.ndarray | None = None

    def rows(self, which: Sequence[int]) -> "Seen":
        """Of some of the pictures."""
        chosen = (None if x is None else x[list(which)] for x in (self.inception_ND, self.clip_NP))
        inception, clip = chosen
        return Seen(None if inception is None else Statistics.of(inception), inception, clip)


def see(networks: Networks, pictures: Sequence[features.Picture], name: str) -> Seen:
    """Features of pictures, with a progress bar called `name`."""
    inception = clip = None
    if networks.inception is not None:
        inception = _run(networks.inception, pictures, f"Inception: {name}")
    if networks.clip is not None:
        clip = _run(networks.clip[0], pictures, f"CLIP: {name}")
    return Seen(None if inception is None else Statistics.of(inception), inception, clip)


def reference(networks: Networks, path: str) -> tuple[Seen, list[epath.Path]]:
    """Real pictures of a folder and all below it, and their files; or of statistics, and no files.

    Statistics are an .npz of mean and covariance (mu, sigma; pytorch-fid's and clean-fid's), or of
    features (feats). Raises MissingError, ConfigError.
    """
    place = epath.Path(path)
    if place.is_dir():
        files = _pictures(place)
        if not files:
            raise MissingError(f"--reference={path} has no picture ({', '.join(_SUFFIXES)}).")
        return see(networks, files, "real pictures"), files
    if not place.is_file():
        raise MissingError(f"--reference={path}: no such folder of pictures, and no such file.")
    try:
        if "feats" in read_arrays(place):
            found = features.load(place)
            return Seen(Statistics.of(found), found), []
        return Seen(Statistics.load(place)), []
    except ValueError as error:
        raise ConfigError(f"--reference={path}: {error}") from error


def _pictures(folder: epath.Path) -> list[epath.Path]:
    """Files of pictures in a folder and its folders, in order."""
    found = []
    for file in sorted(folder.iterdir()):
        if file.is_dir():
            found += _pictures(file)
        elif file.suffix.lower() in _SUFFIXES:
            found.append(file)
    return found


def compare(
    networks: Networks, drawn: Seen, real: Seen, prompts: Sequence[str] | None = None
) -> dict[str, dict[str, Any]]:
    """{'FID': {'value', 'interval', 'n'}, ...} of what both sides have seen.

    Raises ConfigError where statistics are of another network, or there are too few pictures.
    """
    found: dict[str, dict[str, Any]] = {}
    try:
        if drawn.inception_ND is not None and real.statistics is not None:
            groups = min(20, len(drawn.inception_ND) - 1)
            fid = distances.fid(drawn.inception_ND, real.statistics, groups=groups)
            found["FID"] = fid._asdict()
        if drawn.inception_ND is not None and real.inception_ND is not None:
            size = min(_SUBSET, len(drawn.inception_ND), len(real.inception_ND))
            kid = distances.kid(drawn.inception_ND, real.inception_ND, subset_size=size)
            spread = f"deviation {1000 * kid.deviation:.3g} over {kid.subsets} subsets of {size}"
            value = {"value": 1000 * kid.mean, "interval": None, "n": len(drawn.inception_ND)}
            found[f"KID x 1000 ({spread})"] = value
        if drawn.clip_NP is not None and real.clip_NP is not None:
            found["CMMD"] = distances.cmmd(drawn.clip_NP, real.clip_NP)._asdict()
        if drawn.clip_NP is not None and prompts is not None:
            texts = _run(networks.clip[1], prompts, "CLIP: prompts")
            found["CLIP score"] = distances.clip_score(drawn.clip_NP, texts)._asdict()
    except ValueError as error:
        raise ConfigError(f"The pictures cannot be compared: {error}") from error
    return found


def report(found: Mapping[str, Mapping[str, Any]], count: int) -> dict[str, Any]:
    """What `compare` found as a report: FID is the score, or else the CLIP score."""
    rest = dict(found)
    name = "FID" if "FID" in rest else "CLIP score"
    score = rest.pop(name)
    told = {"metric": name, "better": "lower" if name == "FID" else "higher"}
    told |= {"score": score["value"], "interval": score["interval"], "metrics": rest}
    pipeline = PIPELINE
    if name == "FID" and count < _LEAST:
        pipeline += (
            f" Of {count} pictures, fewer than {_LEAST}, the covariance is singular, and FID is "
            "much higher than of many."
        )
    return told | {"pipeline": pipeline}


def read_mjhq(path: str) -> dict[str, tuple[str, str]]:
    """{id: (category, prompt)} of meta_data.json, in order. Raises MissingError, ConfigError."""
    text = _text(path, METADATA)
    try:
        entries = json.loads(text).items()
        found = {key: (value["category"], value["prompt"]) for key, value in entries}
        for key, (category, prompt) in found.items():
            if not (isinstance(prompt, str) and _plain(key) and _plain(category)):
                raise ValueError(f"the entry {key!r} is none of it")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not {METADATA}: {error}.") from error
    return found


def read_captions(path: str) -> dict[str, str]:
    """{name: caption}: COCO's annotations (.json), lines with 'caption' (.jsonl), or text lines.

    Of COCO, the caption of the lowest id of each image, named for the image; else by line. Raises
    MissingError, ConfigError.
    """
    what = "captions_val2014.json of COCO, a .jsonl with 'caption', or a .txt of lines"
    text = _text(path, what)
    try:
        if path.endswith(".json"):
            rows = sorted(json.loads(text)["annotations"], key=lambda row: row["id"], reverse=True)
            by_image = {int(row["image_id"]): row["caption"] for row in rows}
            found = {f"{image:012d}": by_image[image] for image in sorted(by_image)}
        else:
            lines = [line for line in text.split("\n") if line.strip()]
            if path.endswith(".jsonl"):
                lines = [json.loads(line)["caption"] for line in lines]
            found = {f"{i:012d}": line for i, line in enumerate(lines)}
        if not found or not all(isinstance(caption, str) for caption in found.values()):
            raise ValueError("there are none, or some are no text")
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} has no captions that can be read ({what}): {error}.") from error
    return {name: " ".join(caption.split()) for name, caption in found.items()}


def some_of(count: int, most: int | None, seed: int) -> list[int]:
    """`most` places of `count`, drawn by the seed, in order; None: all. Those of fewer are among
    those of more.
    """
    return sorted(np.random.default_rng(seed).permutation(count)[:most].tolist())


def _text(path: str, what: str) -> str:
    file = epath.Path(path)
    if not file.is_file():
        raise MissingError(f"--prompts={path}: no such file. It is {what}.")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text in UTF-8: {error}.") from error


def _plain(name: Any) -> bool:
    """Whether it can be a file's name."""
    letters = str(name).replace("-", "").replace("_", "").replace(" ", "")
    return isinstance(name, str) and letters.isalnum()


def _run(extractor: features.Extractor, items: Sequence[Any], name: str) -> np.ndarray:
    with Progress(len(items), name=name, shown=jax.process_index() == 0) as bar:
        return extractor(items, progress=bar.update)
