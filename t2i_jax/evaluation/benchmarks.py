"""Benchmarks: which there are, and what each makes of a model.

    scenes   held-out compositions of the built-in world in six categories, read back from the
             pixels (scenes.py), with two controls that show that the text is used: the same images
             against the prompts in another order, and the prompts against images of ''
    digits   handwritten digits, told by a linear classifier of real ones
    geneval  553 prompts x 4, laid out for the official scorer, and its results read
    dpg      1,065 prompts x 4, likewise
    mjhq     30,000 prompts in ten categories: FID to pictures that people liked, whole and each
    coco     captions of photographs: FID to these, and CLIP score

A benchmark draws by `draw` (drawn.py: into files, going on where a killed run ended) or, in
training, by the pipeline itself.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
import difflib
import json
import shlex
import subprocess
from typing import Any, NamedTuple

from etils import epath
import jax
import numpy as np

from t2i_jax import distributed
from t2i_jax.errors import ConfigError, UserError
from t2i_jax.evaluation import dpg, drawn, geneval, realism
from t2i_jax.evaluation import report as pages
from t2i_jax.evaluation.drawn import Item, Way
from t2i_jax.evaluation.report import Sample
from t2i_jax.options import resolve
from t2i_jax.pipeline import Pipeline, check_there

Report = dict[str, Any]
Samples = dict[str, list[Sample]]  # by category
_SHOWN = 24  # samples of a category


class Setting(NamedTuple):
    """What a benchmark is run on, and with whose files."""

    way: Way
    folder: epath.Path | None  # for images; None: they are not kept
    num_images: int | None = None  # None: all that the benchmark has
    prompts: str = ""  # the user's copy of the benchmark's
    reference: str = ""  # real images, or their statistics
    inception: str = ""  # weights of FID's network
    clip: str = ""  # directory of a CLIP
    scorer: str = ""  # checkout of the official scorer
    scorer_python: str = "python"  # of the environment that it is installed in
    scorer_args: str = ""  # further words for it
    results: str = ""  # of the official scorer, run elsewhere

    def images(self, part: str, prompts: Sequence[str]) -> list[np.ndarray]:
        """An image of each prompt, numbered from 0; where they are kept, in the folder `part`."""
        way = self.way
        if self.folder is None:
            return list(way.pipeline.draw(prompts, seed=way.seed, **way.choices))
        items = [Item(f"{i:05d}.png", prompt, (i,)) for i, prompt in enumerate(prompts)]
        drawn.draw(way, items, self.folder / part, f"drawing {part}")
        return [drawn.read(self.folder / part, item)[0] for item in items]


def run(name: str, setting: Setting) -> tuple[Report, Samples]:
    """The report {'benchmark', 'score', ...}, and pictures to look at.

    Raises ConfigError for an unknown name, or where a model was trained on another world.
    """
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name, BENCHMARKS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"Unknown benchmark {name!r}; known: {', '.join(BENCHMARKS)}.{hint}")
    source = setting.way.pipeline.config.data.source
    if name in WORLDS and source != name:
        raise ConfigError(
            f"The benchmark {name!r} is for models with data.source = {name!r}; this one was "
            f"trained on {source!r}."
        )
    found, samples = BENCHMARKS[name](setting)
    way = setting.way
    told = {**way.told, "checkpoint_step": way.pipeline.step, "seed": way.seed}
    how = {key: value for key, value in way.about.items() if key not in told}
    return {"benchmark": name, **told, "sampling": how, **found}, samples


def _scenes(setting: Setting) -> tuple[Report, Samples]:
    from t2i_jax.data.scenes import Scenes
    from t2i_jax.evaluation import scenes

    count, seed = setting.num_images or 300, setting.way.seed
    size = setting.way.pipeline.config.data.image_size
    source = Scenes(size, "heldout", seed=seed, length=count)
    prompts = [source.prompt(i) for i in range(count)]
    images = setting.images("prompts", [prompt.text for prompt in prompts])
    null = setting.images("null", [""] * count)
    passed = scenes.passes(images, prompts)
    result = scenes.summary(passed, prompts)
    order = np.random.default_rng(seed).permutation(count)
    shuffled = [prompts[i] for i in order]  # now and then, another prompt asks for the same
    samples: Samples = {}
    for image, prompt, good in zip(images, prompts, passed, strict=True):
        samples.setdefault(prompt.category, []).append(Sample(image, prompt.text, good))
    return {
        "metric": "accuracy",
        "better": "higher",
        "num_images": count,
        "score": result["overall"],
        "interval": result["micro"]["interval"],
        "categories": result["categories"],
        "controls": {
            "shuffled": scenes.score(images, shuffled)["overall"],
            "null": scenes.score(null, prompts)["overall"],
        },
    }, samples


def _digits(setting: Setting) -> tuple[Report, Samples]:
    from t2i_jax.evaluation import digits

    count, data = setting.num_images or 300, setting.way.pipeline.config.data
    labels = np.arange(count) % 10
    prompts = [f"a handwritten {digits.WORDS[label]}" for label in labels]
    images = np.stack(setting.images("prompts", prompts))
    found = digits.score(images, labels, data.image_size, data.validation_size)
    right = found.pop("right")
    samples: Samples = {}
    for image, label, prompt, good in zip(images, labels, prompts, right, strict=True):
        samples.setdefault(digits.WORDS[label], []).append(Sample(image, prompt, good))
    told = {"metric": "accuracy", "better": "higher", "num_images": count}
    return told | found, samples


def _kept(setting: Setting, name: str) -> epath.Path:
    if setting.folder is None:
        raise ConfigError(f"The benchmark {name!r} is of images in files: name a folder for them.")
    return setting.folder


def _needs(setting: Setting, name: str, what: str) -> None:
    if not setting.prompts:
        raise ConfigError(f"--benchmark={name} needs --prompts=...: {what}.")


def _geneval(setting: Setting) -> tuple[Report, Samples]:
    _needs(setting, "geneval", geneval.WHERE)
    folder, records = _kept(setting, "geneval"), geneval.read_prompts(setting.prompts)
    records = records[: _prompts(setting, geneval.PER_PROMPT)]
    items = geneval.items(records)
    drawn.draw(setting.way, items, folder, "drawing", alone=True)
    with distributed.together():
        if jax.process_index() == 0:
            geneval.write_metadata(folder, records)
    results = folder.parent / f"{folder.name}_results.jsonl"
    command = geneval.command(setting.scorer_python, folder.resolve(), results.resolve())
    expected = Counter(item.prompt for item in items)
    scores = _scored(setting, command, results, geneval.read_results, expected)
    kinds = [geneval.KINDS[record["tag"]] for record in records for _ in range(geneval.PER_PROMPT)]
    return {"num_images": len(items), **scores}, _shown(folder, items, kinds)


def _dpg(setting: Setting) -> tuple[Report, Samples]:
    _needs(setting, "dpg", dpg.WHERE)
    folder, prompts = _kept(setting, "dpg"), dpg.read_prompts(setting.prompts)
    size = setting.way.options
    if size.height != size.width:
        raise ConfigError("DPG-Bench's scorer cuts squares: give the same --height and --width.")
    prompts = dict(list(prompts.items())[: _prompts(setting, dpg.PER_PROMPT)])
    items = dpg.items(prompts)
    drawn.draw(setting.way, items, folder, "drawing", alone=True)
    results = folder.parent / f"{folder.name}_results.txt"
    place = folder.resolve()
    command = dpg.command(setting.scorer_python, place, results.resolve(), size.height)
    expected = Counter({name: dpg.PER_PROMPT for name in prompts})
    scores = _scored(setting, command, results, dpg.read_results, expected)
    count = dpg.PER_PROMPT * len(items)
    return {"num_images": count, **scores}, _shown(folder, items, ["prompts"] * len(items))


def _prompts(setting: Setting, per_prompt: int) -> int | None:
    """How many prompts: of --num_images, which they must divide; None: all."""
    if setting.num_images is None:
        return None
    if setting.num_images % per_prompt:
        raise ConfigError(f"--num_images={setting.num_images}: {per_prompt} images a prompt.")
    return setting.num_images // per_prompt


def _scored(
    setting: Setting,
    command: list[str],
    results: epath.Path,
    read: Callable[[epath.PathLike], dict[str, Any]],
    expected: Counter[str],
) -> dict[str, Any]:
    """What an official scorer found: run here, where it is installed, or elsewhere before.

    `expected` images of each prompt. Raises ConfigError where the results are of other prompts; of
    fewer the report says how many.
    """
    words = [*command, *shlex.split(setting.scorer_args)]
    if not setting.results and not setting.scorer:
        todo = f"In the scorer's checkout: {shlex.join(words)}; then again with --results={results}"
        return {"metric": "not scored", "better": "higher", "score": None, "todo": todo}
    if not setting.results:
        _run_scorer(setting.scorer, words)
    file = setting.results or results
    found = read(file)
    scored = Counter(found.pop("scored"))
    if others := [name for name in scored if name not in expected]:
        raise ConfigError(f"{file} has results of other prompts, {others[0]!r} among them.")
    if scored.total() < expected.total():
        some = f"The scorer has {scored.total()} of {expected.total()} images"
        found["pipeline"] = f"{some}; look into what it said of the others."
    return found | {"scored_images": scored.total()}


def _run_scorer(checkout: str, words: list[str]) -> None:
    with distributed.together():
        if jax.process_index() == 0:
            try:
                done = subprocess.run(words, cwd=checkout, check=False)
            except OSError as error:
                raise ConfigError(f"--scorer={checkout}: {error}.") from error
            if done.returncode:
                raise UserError(
                    f"The official scorer ended with status {done.returncode}; its own message is "
                    f"above. In {checkout} it was: {shlex.join(words)}"
                )


def _shown(folder: epath.Path, items: Sequence[Item], categories: Sequence[str]) -> Samples:
    """Some images of each category, from their files."""
    samples: Samples = {}
    for item, category in zip(items, categories, strict=True):
        some = samples.setdefault(category, [])
        if len(some) < _SHOWN:
            some += [Sample(image, item.prompt) for image in drawn.read(folder, item)]
    return samples


def _mjhq(setting: Setting) -> tuple[Report, Samples]:
    _needs(setting, "mjhq", realism.METADATA)
    folder, prompts = _kept(setting, "mjhq"), realism.read_mjhq(setting.prompts)
    rows = [(f"{category}/{key}.png", text) for key, (category, text) in prompts.items()]
    items = _some(setting, rows, None)
    categories = [item.file.split("/")[0] for item in items]
    found = _compared(setting, items, categories)
    return {"num_images": len(items), **found}, _shown(folder, items, categories)


def _coco(setting: Setting) -> tuple[Report, Samples]:
    _needs(setting, "coco", "a file of captions")
    folder, captions = _kept(setting, "coco"), realism.read_captions(setting.prompts)
    items = _some(setting, [(f"{key}.png", text) for key, text in captions.items()], 30_000)
    found = _compared(setting, items, None)
    return {"num_images": len(items), **found}, _shown(folder, items, ["captions"] * len(items))


def _some(setting: Setting, rows: Sequence[tuple[str, str]], most: int | None) -> list[Item]:
    """--num_images of (file, prompt), at most `most`, drawn by the seed; numbered as all are."""
    count = setting.num_images or most
    places = realism.some_of(len(rows), count, setting.way.seed)
    return [Item(*rows[i], (i,)) for i in places]


def _compared(
    setting: Setting, items: Sequence[Item], categories: Sequence[str] | None
) -> dict[str, Any]:
    """Draws, and compares with real pictures and prompts what there are networks for.

    With `categories`, whose names the folders of the reference have, FID is told of each, too.
    """
    if not setting.clip and not (setting.inception and setting.reference):
        drawn.draw(setting.way, items, setting.folder, "drawing")
        todo = "--reference and --inception give FID and KID, --clip the CLIP score and CMMD."
        return {"metric": "not scored", "better": "lower", "score": None, "todo": todo}
    networks, real, files = realism.load(setting.inception, setting.clip, setting.reference)
    drawn.draw(setting.way, items, setting.folder, "drawing")
    paths = [setting.folder / item.file for item in items]
    seen = realism.see(networks, paths, "drawn pictures")
    found = realism.compare(networks, seen, real, [item.prompt for item in items])
    told = realism.report(found, len(items))
    if categories is None or not files or seen.inception_ND is None:
        return told
    parts = {}
    for category in dict.fromkeys(categories):
        ours = [i for i, name in enumerate(categories) if name == category]
        theirs = [i for i, file in enumerate(files) if file.parent.name == category]
        if len(ours) > 2 and len(theirs) > 1:
            only = realism.Networks(networks.inception, None)
            fid = realism.compare(only, seen.rows(ours), real.rows(theirs))["FID"]
            parts[category] = {"fraction": fid["value"], "interval": fid["interval"]}
            parts[category] |= {"n": len(ours)}
    return told | {"categories": parts}


WORLDS = ("scenes", "digits")  # of models that were trained on them
BENCHMARKS: dict[str, Callable[[Setting], tuple[Report, Samples]]] = {
    "scenes": _scenes,
    "digits": _digits,
    "geneval": _geneval,
    "dpg": _dpg,
    "mjhq": _mjhq,
    "coco": _coco,
}


def evaluate(
    name: str | None,
    checkpoints: Sequence[str],
    choices: Mapping[str, Any],
    *,
    images: str | None,
    out: epath.Path,
    seed: int,
    weights: str,
    least: float | None = None,
    **given: Any,
) -> Iterator[tuple[Report, Samples]]:
    """What `run` gives of one checkpoint after the other; `name` None: that of their data.

    Images are drawn into the folder `images`, of several checkpoints into one there with the
    checkpoint's name; where none is named, into one beside `out` that is named for benchmark,
    prompts and the way they are drawn, so that another has another folder. `given` are fields of
    `Setting`. Raises UserError; for what can be known of all of them, before anything is drawn.
    """
    for checkpoint in checkpoints:
        check_there(checkpoint)
    if least is not None and name in ("mjhq", "coco"):
        raise ConfigError(f"--require is for scores of which more is better, not for {name}.")
    names = [epath.Path(checkpoint).name for checkpoint in checkpoints]
    if len(set(names)) < len(names):
        names = [f"{i:02d}_{one}" for i, one in enumerate(names)]

    def one(part: str, checkpoint: str) -> tuple[Report, Samples]:
        pipeline = Pipeline.load(checkpoint, weights=weights)
        resolve(pipeline.config, **choices)  # what is wrong is said before anything is drawn
        way = Way(pipeline, seed, choices, {"checkpoint": checkpoint, "weights": weights})
        which = name or pipeline.config.data.source
        if images is None:
            prompts = given.get("prompts", "")
            folder = out.parent / f"{out.stem}_images" / way.checksum(which, prompts)
        else:
            folder = epath.Path(images) / (part if len(names) > 1 else "")
        return run(which, Setting(way, folder, **given))

    for part, checkpoint in zip(names, checkpoints, strict=True):
        yield one(part, checkpoint)  # nothing of a pipeline is left when the next one is loaded


def write(path: epath.Path, reports: Sequence[Report], samples: Sequence[Samples]) -> None:
    """Writes reports as JSON (one, or a list), and beside it as HTML with samples."""
    whole = reports[0] if len(reports) == 1 else list(reports)
    path.write_text(json.dumps(whole, indent=2) + "\n")
    pages.write(path.with_suffix(".html"), reports, samples)


def require(report: Report, least: float) -> None:
    """Raises UserError where a score is less than that, or not above its controls."""
    if report["score"] is None or report["better"] != "higher":
        raise ConfigError(f"--require is for scores; {report['benchmark']} has none here.")
    score = report["score"]
    if score < least:
        raise UserError(f"score {score:.3f} is below the required {least}")
    for control, value in report.get("controls", {}).items():
        if report["interval"][0] <= value:
            raise UserError(f"score {score:.3f} is not above {control} prompts: {value:.3f}")


def table(report: Report) -> str:
    """A report as text."""
    count = report["num_images"]
    if report["score"] is None:
        return f"{report['benchmark']}: {count} images, not scored. {report['todo']}"
    lines = [f"{report['benchmark']}: {report['metric']} {report['score']:.3f} on {count} images"]
    for name, part in report.get("categories", {}).items():
        lines.append(f"  {name:<18} {part['fraction']:.2f}{_within(part['interval'])}")
    for name, part in report.get("metrics", {}).items():
        lines.append(f"  {name:<18} {part['value']:.3f}{_within(part['interval'])}")
    for name, value in report.get("controls", {}).items():
        lines.append(f"  control, {name:<9} {value:.2f}")
    return "\n".join(lines)


def _within(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"  (95%: {interval[0]:.2f} to {interval[1]:.2f})"
