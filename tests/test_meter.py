"""How progress is shown: plain lines, JSON events, a live bar."""

from __future__ import annotations

import io
import threading
import time

import pytest

from mxconv.meter import Counter, EventMeter, LiveMeter, PlainMeter


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_counter_speed_and_time_left():
    clock = Clock()
    counter = Counter(clock)
    counter.start("convert", 1000)
    assert counter.seconds_left is None
    clock.now += 2
    counter.advance(250, "layers.0")
    assert counter.bytes_per_second == 125
    assert counter.seconds_left == 6
    counter.start("check", 0)
    assert (counter.done_bytes, counter.item, counter.seconds_left) == (0, "", None)


def test_counter_is_thread_safe():
    counter = Counter()
    counter.start("convert", 0)
    threads = [threading.Thread(target=lambda: [counter.advance(1) for _ in range(5000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.done_bytes == 20000


def test_plain_meter_says_a_line_a_file_whatever_its_length():
    clock, lines = Clock(), []
    meter = PlainMeter(lines.append, clock=clock)
    meter.start("quantize", 4 << 20)
    clock.now += 2
    meter.advance(1 << 20, "layers.0")
    name = "rank0/" + "x" * 120 + ".safetensors"
    meter.file_done(name, 1 << 20)
    clock.now += 2
    meter.advance(3 << 20)
    meter.finish()
    meter.finish()
    assert lines == [
        f"quantize: wrote {name}, 1.0 MiB; 1.0 MiB of 4.0 MiB (25 %), 524.3 kB/s, 6.0 s left",
        "quantize: 4.0 MiB in 4.0 s, 1.0 MB/s, 1 file",
    ]


def test_plain_meter_speaks_while_nothing_finishes():
    lines: list[str] = []
    meter = PlainMeter(lines.append, interval=0.1)
    meter.start("quantize", 1 << 20)
    meter.advance(1 << 10, "layers.3")
    deadline = time.monotonic() + 10
    while len(lines) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    meter.cancel()
    assert len(lines) >= 2 and lines[0].startswith("quantize: 1.0 KiB of 1.0 MiB (0 %)") and lines[0].endswith(", layers.3")
    assert not any(line.startswith("quantize: 1.0 KiB in") for line in lines), "a cancelled phase has no summary"
    said = len(lines)
    time.sleep(0.3)
    assert len(lines) == said


def test_control_characters_of_names_are_escaped():
    lines: list[str] = []
    meter = PlainMeter(lines.append)
    meter.start("convert\x1b", 0)
    meter.file_done("a\x1b[2Jb\n", 1)
    meter.finish()
    assert all(line.isprintable() for line in lines) and "\\x1b[2Jb\\n" in lines[0]


def test_event_meter_emits_at_most_one_progress_a_second():
    clock, events = Clock(), []
    meter = EventMeter(lambda event, fields: events.append((event, fields)), clock=clock)
    meter.start("convert", 100)
    for _ in range(30):
        clock.now += 0.1
        meter.advance(1, "layers.1")
    meter.file_done("a.safetensors", 30)
    meter.finish()
    meter.finish()
    assert [event for event, _ in events][:1] == ["start"] and [event for event, _ in events][-2:] == ["file", "finish"]
    assert 2 <= sum(event == "progress" for event, _ in events) <= 3
    assert events[-1][1] == {"phase": "convert", "done_bytes": 30, "total_bytes": 100, "seconds": 3.0, "files": 1}


@pytest.mark.parametrize("total", [0, 1 << 20])
def test_live_meter_draws_and_leaves_a_summary(total):
    screen, lines = Terminal(), []
    meter = LiveMeter(screen, lines.append, color=False, ascii_only=False)
    meter.start("quantize", total)
    meter.advance(1 << 19, "layers.7")
    assert meter.bars is not None
    meter.bars.refresh()
    meter.pause()
    assert meter.bars is None
    meter.resume()
    meter.finish()
    drawn = screen.getvalue()
    assert "quantize" in drawn and "512.0 KiB" in drawn and "layers.7" in drawn
    assert "\x1b[31m" not in drawn
    assert drawn.count("\x1b[?25l") == drawn.count("\x1b[?25h") == 2, "the cursor comes back"
    assert len(lines) == 1 and lines[0].startswith("quantize: 512.0 KiB in ")
    meter.resume()
    assert meter.bars is None, "nothing is drawn after the end"


def test_a_new_phase_ends_the_running_one():
    lines: list[str] = []
    meter = PlainMeter(lines.append)
    meter.start("one", 0)
    meter.start("two", 0)
    meter.cancel()
    assert [line.split(":")[0] for line in lines] == ["one"]
