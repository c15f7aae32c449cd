import math
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from t2i_jax.evaluation import pictures
from t2i_jax.evaluation.pictures import GAP, grid, loss_plot


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 200, (height, width, 3), dtype=np.uint8)


def test_small_images_are_enlarged_by_a_whole_factor_in_their_place():
    images = [noise(24, 24, seed) for seed in range(5)]
    sheet = np.asarray(grid(images, ["a"] * 5, columns=3, cell=144))
    assert sheet.shape[1] == GAP + 3 * (144 + GAP)
    row = (sheet.shape[0] - GAP) // 2  # one line of caption in both rows
    for i, image in enumerate(images):
        left, top = GAP + (i % 3) * (144 + GAP), GAP + (i // 3) * row
        np.testing.assert_array_equal(sheet[top : top + 144 : 6, left : left + 144 : 6], image)
        np.testing.assert_array_equal(
            sheet[top + 5 : top + 144 : 6, left + 5 : left + 144 : 6], image
        )
    assert (sheet[:GAP] == 255).all() and (sheet[:, :GAP] == 255).all()
    assert (sheet[GAP : GAP + 144, GAP + 144 : 2 * GAP + 144] == 255).all()


def test_what_no_factor_fills_is_centred():
    sheet = np.asarray(grid([noise(20, 40)], [""], columns=1, cell=100))  # twice: 40 x 80
    inner = sheet[GAP : GAP + 100, GAP : GAP + 100]
    np.testing.assert_array_equal(inner[30:70:2, 10:90:2], noise(20, 40))
    assert (inner[:30] == 255).all() and (inner[70:] == 255).all()
    assert (inner[:, :10] == 255).all() and (inner[:, 90:] == 255).all()


def test_large_images_are_reduced_to_fit():
    image = np.full((200, 100, 3), (250, 20, 90), np.uint8)
    sheet = np.asarray(grid([image], [""], columns=4, cell=50))
    assert sheet.shape[1] == 50 + 2 * GAP  # no empty columns
    inner = sheet[GAP : GAP + 50, GAP : GAP + 50]
    assert (inner[:, 12:37] == (250, 20, 90)).all() and (inner[:, 37:] == 255).all()


def test_captions_are_wrapped_under_their_image():
    caption = "a purple square to the left of a white ring above three green triangles"
    short, long = (grid([noise(8, 8)] * 2, ["a", text], 2, 96) for text in ("a", caption))
    assert long.height > short.height + 30
    below = np.asarray(long)[GAP + 96 :]
    assert (below[:, : GAP + 96] < 128).any()  # the short one, under the first
    ink = np.nonzero((below < 128).all(-1)[:, 96 + 2 * GAP :])
    assert ink[1].max() < 96 and ink[0].max() < below.shape[0] - GAP // 2
    assert len({y // 12 for y in ink[0]}) >= 4


def test_wrap_keeps_all_letters_in_lines_that_fit():
    font = pictures.font(12)
    text = "one " + "w" * 60 + " two"
    lines = pictures.wrap(text, font, 100)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert max(map(font.getlength, lines)) <= 100 and len(lines) > 4
    assert pictures.wrap("", font, 100) == [""]


@pytest.mark.parametrize(
    "images, captions, message",
    [
        ([], [], "got 0 images"),
        ([noise(8, 8)], [], "1 images, 0 captions"),
        ([noise(8, 8) / 255.0], ["a"], "uint8 .* got float64"),
        ([noise(8, 8)[..., 0]], ["a"], r"got uint8 \(8, 8\)"),
    ],
)
def test_grid_refuses(images, captions, message):
    with pytest.raises(ValueError, match=message):
        grid(images, captions, columns=2)


def metrics(n=200):
    entries = [
        {"step": i, "loss": math.exp(-i / 20) + 0.1, "learning_rate": 1e-3 * (1 - i / n)}
        for i in range(1, n + 1)
    ]
    return entries + [{"step": i, "validation_loss": 0.3} for i in (100, 200)]


def has_color(image, name):
    color = {"blue": (31, 119, 180), "orange": (255, 127, 14), "green": (44, 160, 44)}[name]
    return (np.abs(image.astype(int) - color).max(-1) < 8).sum() > 20


def test_loss_plot_shows_what_there_is(tmp_path):
    loss_plot(metrics(), tmp_path / "full.png")
    full = np.asarray(Image.open(tmp_path / "full.png").convert("RGB"))
    assert full.shape == (576, 840, 3)
    assert all(has_color(full, name) for name in ("blue", "orange", "green"))

    loss_plot([{"step": i, "loss": 0.5} for i in range(5)], tmp_path / "bare.png")
    bare = np.asarray(Image.open(tmp_path / "bare.png").convert("RGB"))
    assert bare.shape == (432, 840, 3)
    assert [has_color(bare, n) for n in ("blue", "orange", "green")] == [True, False, False]


def test_loss_plot_survives_nan_and_refuses_nothing(tmp_path):
    entries = metrics()
    entries[50]["loss"] = math.nan
    loss_plot(entries, tmp_path / "nan.png")
    assert has_color(np.asarray(Image.open(tmp_path / "nan.png").convert("RGB")), "blue")
    with pytest.raises(ValueError, match="no 'loss'"):
        loss_plot([{"step": 1, "validation_loss": 1.0}], tmp_path / "none.png")


def test_smooth_is_a_centred_mean():
    values = np.array([1.0, 2.0, 6.0, 3.0, 4.0])
    np.testing.assert_allclose(pictures._smooth(values, 3), [1.5, 3.0, 11 / 3, 13 / 3, 3.5])
    np.testing.assert_array_equal(pictures._smooth(values, 1), values)


def test_no_gui_backend_is_chosen():
    code = "import sys, t2i_jax.evaluation.pictures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
