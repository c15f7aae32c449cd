"""A run's data before it trains: a batch as the model will see it, and what the samples are like.

The batch is made by the real loader; the statistics read samples as training does, so that what
they call bad is what training would replace.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent import futures
import io
import tempfile
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from t2i_jax import frozen
from t2i_jax.data import buckets, order, sources
from t2i_jax.data.loader import Batch, Loader
from t2i_jax.data.prompts import Prompts
from t2i_jax.data.samples import Fault, Samples
from t2i_jax.errors import ConfigError, UserError, users_files
from t2i_jax.evaluation import pictures
from t2i_jax.progress import Progress

ROWS, COLUMNS = 32, 8  # of the sheet, at most
_SIDE, _LARGEST = 192, 256  # pixels that pictures are enlarged to, about, or reduced to
GAP, _UNDER = 14, 5  # pixels between pictures, and from a picture to its caption
_COLUMN, _WIDTH = 176, 640  # pixels of a column, and of the sheet, at least
_TITLE, _TEXT, _NOTE = 18, 13, 11  # sizes of the letters
_PAPER = (242, 243, 245)  # not white: where a picture ends is to be seen
_INK, _GREY, _RED, _TILE = (40, 40, 40), (120, 120, 120), (190, 50, 30), (212, 217, 228)
_NAMED = 3  # samples that are named of each kind of fault
_LISTED = 10  # damages of files, and replaced samples, that are named
_BLANK = -1  # the index of the sample that ends the search for a good one


def inspect(
    config: ConfigDict, out: epath.PathLike, *, step=0, samples=1000, rows: int | None = None
) -> str:
    """Draws the batch of `step` as a contact sheet, the PNG `out`; returns a report of the data.

    `rows` of the batch are drawn, by default 32 if it has as many. `samples` are read for the
    statistics, in the order of training; with buckets in that without them, where all take part
    from the start. Raises UserError where data or tokenizer are missing, or arguments make no
    sense. Where no batch can be made, there is no sheet, and the report says why.
    """
    if step < 0 or samples < 1 or (rows is not None and rows < 1):
        raise ConfigError(
            f"step {step}, {samples} samples, {rows} rows: steps count from 0, and one sample and "
            "one row are the least."
        )
    try:
        with users_files():
            source = sources.make_source(config, "train")
    except ImportError as error:  # the message says what to install
        raise UserError(str(error)) from error
    prompts = _prompts(config, source)
    report = _whole(config, source)
    report += _draw_batch(config, source, prompts, epath.Path(out), step, rows or ROWS)
    report += ["", *_statistics(config, source, prompts, min(samples, len(source)))]
    # Names of files may be no Unicode, and whoever prints the report would fail.
    return _printable("\n".join(report))


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _prompts(config: ConfigDict, source: sources.Source) -> Prompts:
    """With the tokenizer that the config names, or one trained as training would."""
    with tempfile.TemporaryDirectory() as workdir:
        path = frozen.tokenizer_path(config, workdir)
        if not config.weights.tokenizer:
            frozen.train_tokenizer(config, source).save(path)
        return frozen.make_prompts(config, path, None)


def _whole(config: ConfigDict, source: sources.Mixture) -> list[str]:
    """Samples and files, before any sample is read."""
    parts = sources.ingredients(config.data)
    lines = [f"{_name(config.data)}: {len(source):,} training samples"]
    if config.data.mixture:
        total = sum(part.weight for part in parts)
        lines += [
            f"  {_percent(part.weight / total)} {_place(part.data)}: {span.stop - span.start:,}"
            for part, span in zip(parts, source.parts, strict=True)
        ]
    if source.files:
        damaged = len({file for file, _ in source.damage})
        lines.append(f"files: {source.files:,}, {damaged:,} damaged")
        if damaged:
            lines[-1] += f" (training refuses more than {_percent(config.data.max_bad_rate)})"
        lines += [
            f"  {file.rpartition('/')[2]}, bytes {lost.start} to {lost.stop}: {lost.reason}"
            for file, lost in source.damage[:_LISTED]
        ]
        lines += _more(len(source.damage) - _LISTED)
    return lines


def _name(data: ConfigDict) -> str:
    return f"mixture of {len(data.mixture)}" if data.mixture else _place(data)


def _place(data: Any) -> str:
    return f"{data.source} {data.path}" if data.source in sources.FILES else data.source


def _more(count: int, indent: str = "  ") -> list[str]:
    return [f"{indent}and {count:,} more"] if count > 0 else []


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


# --- the sheet ---


class _Heard:
    """Prompts that remember the captions they were given last."""

    def __init__(self, prompts: Prompts):
        self._prompts, self.captions = prompts, []

    def encode(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        self.captions = list(captions)
        return self._prompts.encode(captions)


class _Cell(NamedTuple):
    """A place of the sheet: a picture, the caption, and what is said of both."""

    picture: Image.Image
    caption: str
    note: str
    dropped: bool
    cut: bool


def _draw_batch(config, source, prompts, out: epath.Path, step: int, rows: int) -> list[str]:
    """Writes the sheet; what the report says of it."""
    size, data = config.train.batch_size, config.data
    rows = min(rows, size)
    heard = _Heard(prompts)
    try:
        with users_files():
            loader = Loader(source, heard, data, size, config.seed, range(rows))
        batch, shape = loader.batch(step), loader.shape(step)
    except UserError as error:  # no sample is good: the statistics say what is wrong
        return [f"no sheet: {error}"]
    cells = _cells(batch, heard.captions, prompts, shape)[:rows]
    kind = "bucket" if data.buckets else "size"
    what = f"step {step}, {kind} {shape[1]}x{shape[0]}, {rows} of {size} rows"
    png = io.BytesIO()
    _sheet(f"{_name(data)}, {what}", cells).save(png, "PNG")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(png.getvalue())
    dropped, cut = (sum(getattr(cell, name) for cell in cells) for name in ("dropped", "cut"))
    lines = [f"sheet: {out}: {what}; {dropped} captions dropped, {cut} cut"]
    told = [f"  replaced: {f.sample}: {f.cause}, {f.detail}" for f in batch.faults]
    return lines + told[:_LISTED] + _more(len(told) - _LISTED)


def _cells(batch: Batch, captions: Sequence[str], prompts: Prompts, shape) -> list[_Cell]:
    cells, arrays = [], batch.arrays
    for i, caption in enumerate(captions):
        picture = _tile(arrays["moments"][i], shape) if "moments" in arrays else arrays["image"][i]
        ids = arrays["ids"][i][arrays["mask"][i]]
        text = prompts.tokenizer.decode(ids) if caption else "(dropped)"
        (whole,) = prompts.counts([caption]) if caption else (len(ids),)
        cut = whole > len(ids)
        count = f"cut: {len(ids)} of {whole}" if cut else f"{len(ids)}"
        note = f"{count} token{'s' * (whole > 1)}, {shape[1]}x{shape[0]}"
        cells.append(_Cell(pictures.fit(picture, _side(shape)), text, note, not caption, cut))
    return cells


def _side(shape: tuple[int, int]) -> int:
    """Pixels of a picture's longer side on the sheet: of a small one a multiple of its own."""
    longer = max(shape)
    return min(longer * max(1, round(_SIDE / longer)), _LARGEST)


def _tile(moments: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """What stands for a picture that would have to be decoded."""
    size = [round(_side(shape) * n / max(shape)) for n in reversed(shape)]
    tile, middle = Image.new("RGB", size, _TILE), (size[0] / 2, size[1] / 2)
    text = f"latents {moments.shape[0]} x {moments.shape[1]}"
    ImageDraw.Draw(tile).text(middle, text, _INK, pictures.font(_TEXT), anchor="mm")
    return np.asarray(tile)


class _Line(NamedTuple):
    """A line of text on the sheet."""

    text: str
    font: ImageFont.FreeTypeFont
    color: tuple[int, int, int]


def _wrapped(text: str, size: int, color, width: int) -> list[_Line]:
    font = pictures.font(size)
    return [_Line(line, font, color) for line in pictures.wrap(_printable(text), font, width)]


def _sheet(title: str, cells: Sequence[_Cell]) -> Image.Image:
    """Rows of cells under a title, each as high as its longest caption."""
    columns = min(COLUMNS, len(cells))
    column = max(_COLUMN, cells[0].picture.width)
    width = max(_WIDTH, GAP + columns * (column + GAP))
    head = _wrapped(title, _TITLE, _INK, width - 2 * GAP)
    texts = [_texts(cell, column) for cell in cells]
    tops, y = [], GAP + _height(head) + GAP
    for row in range(0, len(cells), columns):
        tops.append(y)
        highest = max(map(_height, texts[row : row + columns]))
        y += cells[0].picture.height + _UNDER + highest + GAP
    sheet = Image.new("RGB", (width, y), _PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, GAP, GAP, head)
    for i, (cell, text) in enumerate(zip(cells, texts, strict=True)):
        left, top = GAP + (i % columns) * (column + GAP), tops[i // columns]
        sheet.paste(cell.picture, (left, top))
        _write(draw, left, top + cell.picture.height + _UNDER, text)
    return sheet


def _texts(cell: _Cell, width: int) -> list[_Line]:
    caption = _wrapped(cell.caption, _TEXT, _GREY if cell.dropped else _INK, width)
    return caption + _wrapped(cell.note, _NOTE, _RED if cell.cut else _GREY, width)


def _height(lines: Sequence[_Line]) -> int:
    return sum(sum(line.font.getmetrics()) + 1 for line in lines)


def _write(draw: ImageDraw.ImageDraw, left: int, top: int, lines: Sequence[_Line]) -> None:
    for line in lines:
        draw.text((left, top), line.text, fill=line.color, font=line.font)
        top += _height([line])


# --- the statistics ---


class _Alone:
    """Source and order for `Samples`, in which a blank follows a bad sample: no other is read."""

    def __init__(self, source: sources.Source, index_P: Sequence[int]):
        self._source, self._index_P = source, index_P

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        if i == _BLANK:
            return {"image": np.zeros((1, 1, 3), np.uint8), "captions": ("-",)}
        return self._source[i]

    def name(self, i: int) -> str:
        return self._source.name(i)

    def index(self, step: int, row: int) -> int:
        return self._index_P[step]

    def replacement(self, step: int, row: int, attempt: int) -> int:
        return _BLANK


class _Read(NamedTuple):
    """A good sample: its size, the shape (height, width) it is for, and a caption."""

    width: int
    height: int
    shape: tuple[int, int]
    caption: str
    latents: bool


def _statistics(config, source: sources.Mixture, prompts: Prompts, count: int) -> list[str]:
    """`count` samples, without augmentation."""
    data, bucket_N = config.data, np.full(len(source), order.NO_BUCKET)
    if data.buckets:  # as the loader has them; their sizes are kept
        size_N2 = source.sizes(data.index_dir, data.num_threads)
        bucket_N = buckets.assign(size_N2, buckets.shapes(data.buckets), config.train.batch_size)
    read = _read(config, source, bucket_N, count)
    bad = [each for each in read if isinstance(each, Fault)]
    good = [each for each in read if isinstance(each, _Read)]
    share = f"{len(bad):,} bad ({_percent(len(bad) / count)}"
    share += f"; training stops above {_percent(data.max_bad_rate)})"
    lines = [f"{count:,} samples in the order of training: {len(good):,} good, {share}"]
    lines += _bad(bad, count)
    if good:
        lines += _sizes(good) + _captions([each.caption for each in good], prompts)
    if data.buckets:
        lines += _bucket_shares(data, source, bucket_N)
    return lines


def _read(config, source, bucket_N, count: int) -> list[_Read | Fault]:
    """The samples of the first `count` positions, or what is wrong with them."""
    data, size = config.data, config.train.batch_size
    places = order.Order(source.parts, size, config.seed)
    index_P = [places.index(*divmod(position, size)) for position in range(count)]
    plain = ConfigDict({**data, "caption_dropout": 0.0, "flip": False, "center_crop": True})
    alone = _Alone(source, index_P)
    training = Samples(alone, plain, alone, 1, config.seed)
    shapes = buckets.shapes(data.buckets)
    shapes.append((data.image_size, data.image_size))  # the last: that of NO_BUCKET, which is -1

    def one(position: int) -> _Read | Fault:
        index = index_P[position]
        shape = shapes[bucket_N[index]]
        row = training.read(position, 0, shape)
        if row.faults:
            return row.faults[0]
        return _Read(*source.size(index), shape, row.caption, "moments" in row.arrays)

    with (
        futures.ThreadPoolExecutor(max(1, data.num_threads)) as pool,
        Progress(count, name="reading samples", unit="samples") as progress,
    ):
        read = []
        for each in pool.map(one, range(count)):
            read.append(each)
            progress.update(len(read))
        return read


def _bad(bad: Sequence[Fault], count: int) -> list[str]:
    """Causes, the most frequent first, and samples to look at."""
    lines = []
    for cause, number in Counter(fault.cause for fault in bad).most_common():
        lines.append(f"  {cause}: {number:,} ({_percent(number / count)})")
        of_cause = [fault for fault in bad if fault.cause == cause]
        lines += [f"    {fault.sample}: {fault.detail}" for fault in of_cause[:_NAMED]]
        lines += _more(number - _NAMED, "    ")
    return lines


def _quantiles(values: Sequence[float], *percents: int) -> list[Any]:
    """Of the values that there are: nothing is interpolated."""
    return np.percentile(values, percents, method="inverted_cdf").tolist()


def _sizes(good: Sequence[_Read]) -> list[str]:
    lines = []
    for name in ("width", "height"):
        least, middle, most = _quantiles([getattr(each, name) for each in good], 0, 50, 100)
        lines.append(f"{name}: min {least}, median {middle}, max {most} pixels")
    ratios = _quantiles([each.width / each.height for each in good], 5, 50, 95)
    lines.append("width / height: 5 % {:.2f}, median {:.2f}, 95 % {:.2f}".format(*ratios))
    images = [each for each in good if not each.latents]
    if images:  # latents are as they were made
        small = [each.width < each.shape[1] or each.height < each.shape[0] for each in images]
        lines.append(f"enlarged: {_percent(sum(small) / len(small))}")
    return lines


def _captions(captions: Sequence[str], prompts: Prompts) -> list[str]:
    counts = prompts.counts(captions)
    cut = sum(count > prompts.length for count in counts)
    lines = []
    for name, values in (("characters", [len(text) for text in captions]), ("tokens", counts)):
        middle, high, most = _quantiles(values, 50, 95, 100)
        lines.append(f"caption {name}: median {middle}, 95 % {high}, max {most}")
    return [*lines[:-1], f"{lines[-1]}; {_percent(cut / len(counts))} cut to {prompts.length}"]


def _bucket_shares(data: ConfigDict, source: sources.Mixture, bucket_N: np.ndarray) -> list[str]:
    """How many of all samples are in each bucket, and how often a step is of it."""
    each_B, share_B = np.zeros(len(data.buckets), int), np.zeros(len(data.buckets))
    for part in source.parts:
        of_part = bucket_N[part.start : part.stop]
        counts_B = np.bincount(of_part[of_part >= 0], minlength=len(each_B))
        each_B += counts_B
        share_B += part.weight * counts_B / len(of_part)
    lines = [f"buckets of all {len(source):,} samples:"]
    share_B /= max(share_B.sum(), 1e-30)  # nothing of a source without a readable image
    for text, each, share in zip(data.buckets, each_B, share_B, strict=True):
        lines.append(f"  {text}: {each:,} samples, {_percent(share)} of the steps")
    lost = np.flatnonzero(bucket_N == order.NO_BUCKET)
    if len(lost):
        named = ", ".join(source.name(int(i)) for i in lost[:_NAMED])
        lines.append(f"  none: {len(lost):,} samples whose size is not known, as {named}")
    return lines
