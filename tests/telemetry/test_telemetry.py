"""Metrics files that survive a kill, progress on terminals and in log files, timer arithmetic."""

import io
import json
import struct
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from cap_pretrain.telemetry.metrics import MetricsWriter
from cap_pretrain.telemetry.progress import Progress, format_duration, parameter_table
from cap_pretrain.telemetry.tables import format_table
from cap_pretrain.telemetry.timer import StepTimer


def read_lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def read_events(workdir):
    """Return all TensorBoard events of a workdir, parsing the TFRecord framing by hand."""
    from tensorboardX.proto import event_pb2

    events = []
    for path in (workdir / "tensorboard").iterdir():
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])  # then crc u32, the event, crc u32
            events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def test_each_write_is_one_json_line_on_disk_at_once(tmp_path):
    writer = MetricsWriter(tmp_path / "new" / "run")
    writer.write(100, {"train/loss": np.float32(0.5), "train/acc": jax.numpy.ones(())})
    writer.write(np.int64(200), {"train/loss": 0.25})
    assert read_lines(tmp_path / "new" / "run") == [
        {"step": 100, "train/loss": 0.5, "train/acc": 1.0},
        {"step": 200, "train/loss": 0.25},
    ]
    writer.close()


def test_nan_and_infinity_are_null_in_valid_json(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"a": float("nan"), "b": np.float32("inf"), "c": 1.0})
    writer.close()
    assert read_lines(tmp_path) == [{"step": 1, "a": None, "b": None, "c": 1.0}]
    values = {v.tag: v.simple_value for e in read_events(tmp_path) for v in e.summary.value}
    assert np.isnan(values["a"]) and np.isinf(values["b"])  # TensorBoard can show them


def test_resume_keeps_each_step_once_and_drops_a_truncated_line(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in (0, 10, 20, 30):
        writer.write(step, {"train/loss": float(step)})
    writer.write(20, {"val/loss": 7.0})  # as an evaluator would later
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "train/lo')  # killed here

    writer = MetricsWriter(tmp_path, keep_until=20)
    writer.write(30, {"train/loss": -1.0})
    writer.close()
    expected = [(0, 0.0), (10, 10.0), (20, 20.0), (20, 7.0), (30, -1.0)]
    assert [tuple(line.values()) for line in read_lines(tmp_path)] == expected
    assert not list(tmp_path.glob("*.tmp"))


def test_complete_last_line_without_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.0}')
    writer = MetricsWriter(tmp_path, keep_until=2)
    writer.write(3, {"a": 3.0})
    writer.close()
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2, 3]


def test_a_run_without_checkpoints_starts_its_file_again(tmp_path):
    for _ in range(2):
        writer = MetricsWriter(tmp_path)
        writer.write(0, {"val/loss": 1.0})
        writer.write(10, {"train/loss": 1.0})
        writer.close()
    assert [line["step"] for line in read_lines(tmp_path)] == [0, 10]


def test_other_hosts_write_nothing(tmp_path):
    writer = MetricsWriter(tmp_path / "run", enabled=False)
    writer.write(1, {"a": 1.0})
    writer.text(1, "t", "text")
    writer.images(1, "i", np.zeros((1, 4, 4, 3), np.uint8), ["x"])
    writer.close()
    assert not (tmp_path / "run").exists()


def test_tensorboard_events_read_back(tmp_path):
    writer = MetricsWriter(tmp_path, keep_until=4)
    writer.write(5, {"train/loss": 0.5})
    images = np.full((2, 8, 8, 3), 200, np.uint8)
    writer.images(5, "samples", images, ["a red square", "a blue disc"])
    writer.close()
    events = read_events(tmp_path)
    values = {v.tag: (e.step, v) for e in events for v in e.summary.value}
    step, loss = values["train/loss"]
    assert step == 5 and loss.simple_value == 0.5
    step, grid = values["samples"]
    assert step == 5 and grid.image.encoded_image_string.startswith(b"\x89PNG")
    (text,) = [v for tag, (_, v) in values.items() if "text" in tag]
    assert text.tensor.string_val[0].decode() == "1. a red square\n2. a blue disc"
    # The restart marker: TensorBoard hides what an earlier process wrote from step 5 on.
    assert [e.step for e in events if e.session_log.status == 1] == [5]


def test_event_files_equal_those_of_tensorboardx(tmp_path):
    from tensorboardX import RecordWriter

    writer = MetricsWriter(tmp_path)
    writer.write(1, {"train/loss": 0.5, "train/acc": 1.0})
    writer.text(2, "note", "text")
    writer.close()
    theirs = RecordWriter(str(tmp_path / "theirs"))
    for event in read_events(tmp_path):
        theirs.write(event.SerializeToString())
    theirs.close()
    (ours,) = (tmp_path / "tensorboard").iterdir()
    assert ours.read_bytes() == (tmp_path / "theirs").read_bytes()


def test_writing_leaves_no_thread(tmp_path):
    before = threading.enumerate()
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"a": 1.0})
    assert threading.enumerate() == before
    writer.close()


def test_images_need_a_caption_each(tmp_path):
    writer = MetricsWriter(tmp_path)
    with pytest.raises(ValueError, match="2 images but 1 captions"):
        writer.images(1, "samples", np.zeros((2, 4, 4, 3), np.uint8), ["one"])
    writer.close()


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def run_steps(clock, timer, count, *, wait, work):
    for _ in range(count):
        with timer.data_wait():
            clock.now += wait
        clock.now += work
        timer.step_done()


def test_timer_arithmetic():
    clock = Clock()
    timer = StepTimer(
        total_steps=100, batch_size=32, flops_per_step=6e9, peak_flops=1e11, clock=clock
    )
    with timer.pause():
        clock.now += 50  # building and restoring
    run_steps(clock, timer, 1, wait=3, work=20)  # compiles
    run_steps(clock, timer, 4, wait=0.05, work=0.2)
    first = timer.report(5)
    assert first == pytest.approx({
        "time/compile_s": 20,
        "time/step_ms": 250,
        "time/data_wait_share": 0.2,
        "time/images_per_s": 128,
        "time/mfu": 6e9 / 0.25 / 1e11,
        "time/eta_s": 95 * 0.25,
        "time/goodput": 4 * 0.2 / (50 + 23 + 1),
    })  # fmt: skip

    # Evaluating and saving lengthen the run, not the step; intervals are independent.
    with timer.pause():
        clock.now += 9
    run_steps(clock, timer, 5, wait=0, work=0.1)
    with timer.pause():
        clock.now += 0.5
    second = timer.report(10)
    assert "time/compile_s" not in second
    assert second["time/step_ms"] == pytest.approx(100)
    assert second["time/data_wait_share"] == 0
    assert second["time/eta_s"] == pytest.approx(90 * (1 + 9 + 0.5 + 0.5) / 9)
    assert second["time/goodput"] == pytest.approx((0.8 + 0.5) / (74 + 10))


def test_timer_with_only_the_first_step_and_without_a_known_peak():
    clock = Clock()
    timer = StepTimer(total_steps=2, batch_size=8, flops_per_step=1e9, clock=clock)
    run_steps(clock, timer, 1, wait=1, work=4)
    assert timer.report(1) == {"time/compile_s": 4}
    run_steps(clock, timer, 1, wait=0, work=2)
    report = timer.report(2)
    assert report["time/step_ms"] == 2000 and report["time/eta_s"] == 0
    assert "time/mfu" not in report


def test_the_timer_lets_stop_iteration_pass():
    timer = StepTimer(total_steps=1, batch_size=1)
    with pytest.raises(StopIteration), timer.data_wait():
        next(iter([]))


class Terminal(io.StringIO):
    def isatty(self):
        return True


METRICS = {
    "train/loss": 3.41234,
    "time/images_per_s": 1234.4,
    "time/step_ms": 103.6,
    "time/data_wait_share": 0.0123,
    "time/mfu": 0.331,
    "time/eta_s": 125.0,
    "time/goodput": 0.9,
}


def test_log_file_gets_one_plain_line_per_report():
    stream = io.StringIO()
    progress = Progress(1500, mfu_label="MFU(cpu)", stream=stream)
    progress.say("starting")
    for step in range(1, 11):
        progress.update(step, METRICS if step == 10 else None)
    progress.close()
    assert stream.getvalue() == (
        "starting\n"
        "step 10/1500  ETA 2:05  loss 3.4123  1,234 img/s  104 ms/step  data wait 1.2%"
        "  MFU(cpu) 33.1%\n"
    )


@pytest.mark.parametrize("columns", [12, 40, 80, 200])
def test_terminal_gets_one_line_redrawn_within_its_width(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    progress = Progress(1500, stream=stream)
    for step in range(1, 751):
        progress.update(step, METRICS if step % 250 == 0 else None)
    shown = stream.getvalue()
    frames = shown.split("\r\x1b[K")[1:]
    assert "\n" not in shown
    assert 3 <= len(frames) < 100  # fewer than one per step
    assert all(len(frame) < columns for frame in frames)
    assert frames[-1].startswith(" 50% [####")
    assert ("750/1500  ETA 2:05" in frames[-1]) == (columns >= 40)
    assert ("MFU 33.1%" in frames[-1]) == (columns == 200)
    progress.close()
    assert stream.getvalue().endswith("\n")


def screen(text):
    """Return the lines that a terminal shows after `text`, with erased lines removed."""
    return [line.split("\r\x1b[K")[-1] for line in text.split("\n")]


def test_messages_do_not_garble_the_bar(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    progress = Progress(10, stream=stream)
    progress.say("before")
    progress.update(5, METRICS)
    progress.say("saved\nevaluated")
    progress.close()
    progress.say("after")
    before, saved, evaluated, bar, after, end = screen(stream.getvalue())
    assert (before, saved, evaluated, after, end) == ("before", "saved", "evaluated", "after", "")
    assert bar.startswith(" 50% [") and "loss 3.4123" in bar


def test_durations():
    assert [format_duration(s) for s in (0, 65.4, 3665, 100_000)] == [
        "0:00", "1:05", "1:01:05", "1d 3:46:40"
    ]  # fmt: skip
    assert format_duration(24 * 3600) == "1d 0:00:00"


def test_parameter_table_of_abstract_shapes():
    params = {
        "encoder": {"layers": {0: {"kernel": jax.ShapeDtypeStruct((10**6, 10**6), np.float32)}}},
        "bias": np.zeros(3, np.float32),
    }
    table = parameter_table(params)
    assert "encoder/layers/0/kernel" in table and "(1000000, 1000000)" in table
    assert "Total: 1,000,000,000,003" in table


def test_format_table_aligns():
    table = format_table([("encoder", 21_700_000, 0.5), ("all", np.int64(5), "-")], ("", "n", "x"))
    assert table.splitlines() == [
        "                  n    x",
        "-------  ----------  ---",
        "encoder  21,700,000  0.5",
        "all               5    -",
    ]
    assert format_table([], ("a", "b")) == "a  b\n-  -"


def test_no_tensorflow_is_imported(tmp_path):
    code = (
        "import sys; from cap_pretrain.telemetry.metrics import MetricsWriter;"
        "from cap_pretrain.telemetry.progress import parameter_table;"
        f"w = MetricsWriter({str(tmp_path)!r}); w.write(1, {{'a': 1.0}}); w.text(1, 't', 'x');"
        "w.close(); parameter_table({});"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('tensorflow', 'tensorboard')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
