import io
import json
import math

import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from t2i_jax.progress import Progress
from t2i_jax.training.metrics import MetricWriter, read_metrics


def test_numbers_come_back_with_the_same_bits(tmp_path):
    values = [0.1, 1 / 3, 1e-300, 5e-324, 1.7976931348623157e308, -0.0]
    writer = MetricWriter(tmp_path)
    for step, value in enumerate(values, 1):
        writer.scalars(step, {"loss": value})
    writer.scalars(7, {"loss": np.float32(0.1), "count": np.int64(3)})
    writer.scalars(8, {"loss": jnp.float32(2 / 3), "half": jnp.bfloat16(1.5)})
    writer.close()
    entries = read_metrics(tmp_path)
    assert [e["loss"] for e in entries[:6]] == values
    assert math.copysign(1, entries[5]["loss"]) == -1
    assert entries[6] == {"step": 7, "loss": float(np.float32(0.1)), "count": 3}
    assert type(entries[6]["count"]) is int
    assert np.float32(entries[7]["loss"]) == np.float32(2 / 3)
    assert entries[7]["half"] == 1.5


def test_every_line_is_in_the_file_at_once(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.scalars(1, {"loss": 0.25})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.25}\n'
    writer.scalars(2, {"loss": math.nan})
    assert math.isnan(read_metrics(tmp_path / "metrics.jsonl")[1]["loss"])
    writer.close()
    writer.close()


def test_resume_drops_what_came_after_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = "".join(f'{{"step": {i}, "loss": {i / 10}}}\n' for i in (1, 2, 3))
    path.write_text(kept + '{"step": 4, "loss": 0.4}\n{"step": 5, "lo')
    writer = MetricWriter(tmp_path, resume_step=3)
    assert path.read_text() == kept
    writer.scalars(4, {"loss": 0.5})
    writer.close()
    assert path.read_text() == kept + '{"step": 4, "loss": 0.5}\n'
    assert [p.name for p in tmp_path.glob("metrics*")] == ["metrics.jsonl"]


def test_resume_drops_a_torn_line_that_is_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 0.25}')
    MetricWriter(tmp_path, resume_step=2).close()
    assert path.read_text() == '{"step": 1, "loss": 1}\n'


def test_a_new_run_starts_an_empty_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n')
    MetricWriter(tmp_path).close()
    assert read_metrics(tmp_path) == []


def test_damage_before_the_last_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is not an entry: '\{\"ste'"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("value", [np.zeros(2), "0.1", None])
def test_refuses_what_is_not_a_number(tmp_path, value):
    writer = MetricWriter(tmp_path)
    with pytest.raises(ValueError, match="loss: one number expected"):
        writer.scalars(1, {"loss": value})
    writer.close()
    assert read_metrics(tmp_path) == []


def test_images_are_written_as_they_are(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    writer = MetricWriter(tmp_path / "run")
    writer.image(3, "samples", image, tmp_path / "run" / "samples" / "3.png")
    with pytest.raises(ValueError, match=r"uint8 \(H, W, 3\) expected, got float32"):
        writer.image(3, "samples", image.astype(np.float32))
    writer.close()
    np.testing.assert_array_equal(Image.open(tmp_path / "run" / "samples" / "3.png"), image)


def test_tensorboard_has_scalars_and_images(tmp_path):
    from tensorboardX.proto import event_pb2

    writer = MetricWriter(tmp_path)
    writer.scalars(4, {"loss": 0.5})
    writer.image(4, "samples", np.zeros((2, 2, 3), np.uint8))
    writer.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, events = io.BytesIO(file.read_bytes()), []
    while length := data.read(8):  # records: length, its CRC (4), bytes, their CRC (4)
        data.read(4)
        events.append(event_pb2.Event.FromString(data.read(int.from_bytes(length, "little"))))
        data.read(4)
    found = {value.tag: (e.step, value) for e in events for value in e.summary.value}
    assert found["loss"][0] == 4 and found["loss"][1].simple_value == 0.5
    assert found["samples"][0] == 4 and found["samples"][1].image.width == 2


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_progress_without_a_terminal_is_a_line_at_an_interval():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(100, start=20, images=8, interval=10.0, stream=stream, clock=clock)
    for step in range(21, 101):  # half a second a step: 16 images a second
        progress.update(step, loss=1 / step)
        clock.now += 0.5
    progress.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "training 21/100, loss 0.0476"
    assert lines[1] == "training 41/100, loss 0.0244, 16.0 images/s, 0:30 left"
    assert lines[-1] == "training 100/100, loss 0.0100, 16.0 images/s, 0:00 left"
    assert len(lines) == 5


def test_progress_on_a_terminal_is_a_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    clock, stream = Clock(), Terminal()
    with Progress(
        10, images=4, name="pictures", unit="cards", stream=stream, clock=clock
    ) as progress:
        progress.update(1, loss=2.0)
        clock.now += 2.0
        progress.update(5, loss=1.0)
    shown = stream.getvalue().split("\r")[-1]
    assert shown.startswith("pictures  50%|")
    assert "5/10, loss 1.0000, 8.0 cards/s, 0:02 left" in shown


def test_lines_are_json_objects(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.scalars(np.int32(1), {"loss": 1.0, "done": True})
    writer.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1,
        "loss": 1.0,
        "done": 1,
    }
