"""The one sink: who gets what, on which stream, in which form."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mxconv.console import Console
from mxconv.draw import Column
from mxconv.errors import MalformedInput, Problems, ResourceError, UsageError
from mxconv.meter import EventMeter, LiveMeter, PlainMeter

REPOSITORY = Path(__file__).resolve().parent.parent


class Stream(io.StringIO):
    def __init__(self, terminal: bool = False, encoding: str = "utf-8") -> None:
        super().__init__()
        self.terminal, self._encoding = terminal, encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def isatty(self) -> bool:
        return self.terminal


def make(terminal: bool = False, environ: dict[str, str] | None = None, encoding: str = "utf-8", **options):
    out, err = Stream(terminal, encoding), Stream(terminal, encoding)
    environ = {"TERM": "xterm"} if environ is None else environ
    return Console(stdout=out, stderr=err, environ=environ, **options), out, err


def report(console: Console) -> None:
    console.table("groups", ["name", Column("size", "right")], [["experts", "810.0 GiB"], ["router", "ok"]])
    console.values(None, {"structure": "ok", "numerics": "FAIL"})
    console.note("a note")
    console.warn("a warning")
    console.detail("a detail")
    console.document("inspect", {"tensors": 3})


def test_data_on_stdout_and_chatter_on_stderr():
    console, out, err = make()
    report(console)
    assert out.getvalue() == (
        "groups\n  name          size\n  experts  810.0 GiB\n  router          ok\n  structure  ok\n  numerics   FAIL\n"
    )
    assert err.getvalue() == "note: a note\nwarning: a warning\n"


def test_quiet_and_verbose():
    console, out, err = make(quiet=True, verbose=2)
    report(console)
    assert "groups" in out.getvalue() and err.getvalue() == "warning: a warning\n"
    console, _, err = make(verbose=1)
    report(console)
    assert "a detail\n" in err.getvalue()


def test_json_report_is_one_document():
    console, out, err = make(json=True)
    report(console)
    console.error(UsageError("too late for a second document"))
    assert json.loads(out.getvalue()) == {"schema": "mxconv.inspect", "version": 1, "tensors": 3}
    assert "error: too late" in err.getvalue()


def test_json_error_document():
    console, out, err = make(json=True)
    console.error(Problems([UsageError("a", where="x", hint="do this"), MalformedInput("b", expected=1, got=2)]))
    document = json.loads(out.getvalue())
    assert (document["schema"], document["exit_code"], len(document["problems"])) == ("mxconv.error", 3, 2)
    assert document["problems"][0]["hint"] == "do this"
    assert "hint: do this" in err.getvalue()


def test_json_run_is_lines_of_events():
    console, out, _ = make(json=True, stream=True)
    console.start("convert", 10)
    console.advance(10)
    console.file_done("a.safetensors", 10)
    console.note("something")
    console.finish()
    console.document("convert", {"files": 1})
    console.error(UsageError("oh"))
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["start", "file", "note", "finish", "result", "error"]
    assert events[4]["schema"] == "mxconv.convert" and events[5]["exit_code"] == 2


def test_error_says_where_expected_got_and_hint():
    console, _, err = make()
    console.error(MalformedInput("header is too long", where="a\x1b.safetensors", expected="100", got="999", hint="fetch it again"))
    assert err.getvalue() == "error: a\\x1b.safetensors: header is too long (expected 100, got 999)\nhint: fetch it again\n"


def test_no_control_character_reaches_a_stream():
    console, out, err = make()
    evil = "x\x1b[2J\r\x07\u202e"
    console.table(evil, [evil], [[evil]])
    console.values(None, {evil: evil})
    console.fragment(evil + "\n\t")
    console.note(evil)
    console.warn(evil)
    console.error(UsageError(evil, where=evil))
    console.start(evil, 0)
    console.file_done(evil, 1)
    console.finish()
    console.chart(evil, [evil], [1.0])
    for text in (out.getvalue(), err.getvalue()):
        assert all(c.isprintable() or c in "\n\t" for c in text)


def test_status_words_are_coloured_on_a_terminal_only():
    console, out, err = make(terminal=True)
    console.line("numerics FAIL, structure ok")
    console.error(UsageError("bad", hint="this"))
    assert out.getvalue() == "numerics \x1b[1;31mFAIL\x1b[0m, structure \x1b[32mok\x1b[0m\n"
    assert err.getvalue() == "\x1b[1;31merror:\x1b[0m bad\n\x1b[36mhint:\x1b[0m this\n"


@pytest.mark.parametrize("environ", [{"TERM": "xterm", "NO_COLOR": "1"}, {"TERM": "dumb"}, {}])
def test_no_colour_when_asked(environ):
    console, out, err = make(terminal=True, environ=environ)
    report(console)
    console.error(UsageError("bad"))
    assert "\x1b" not in out.getvalue() + err.getvalue()
    assert "FAIL" in out.getvalue()


@pytest.mark.parametrize(
    ("options", "terminal", "environ", "kinds"),
    [
        ({}, True, {"TERM": "xterm"}, [LiveMeter]),
        ({}, True, {"TERM": "xterm", "NO_COLOR": "1"}, [LiveMeter]),
        ({}, True, {"TERM": "dumb"}, [PlainMeter]),
        ({}, True, {"TERM": "xterm", "CI": "true"}, [PlainMeter]),
        ({}, False, {"TERM": "xterm"}, [PlainMeter]),
        ({"progress": False}, True, {"TERM": "xterm"}, []),
        ({"quiet": True}, False, {}, []),
        ({"json": True}, False, {}, [PlainMeter]),
        ({"json": True, "stream": True}, False, {}, [EventMeter, PlainMeter]),
        ({"json": True, "stream": True}, True, {"TERM": "xterm"}, [EventMeter]),
    ],
)
def test_choice_of_meters(options, terminal, environ, kinds):
    console, _, _ = make(terminal=terminal, environ=environ, **options)
    assert [type(meter) for meter in console._meters] == kinds


def test_live_bar_makes_room_for_lines():
    console, out, err = make(terminal=True)
    with console:
        console.start("quantize", 100)
        console.advance(50, "layers.1")
        console.note("between")
        console.line("data")
        console.finish()
    assert "note:\x1b[0m between\n" in err.getvalue() and out.getvalue() == "data\n"
    assert err.getvalue().count("\x1b[?25l") == err.getvalue().count("\x1b[?25h")
    assert err.getvalue().rstrip().splitlines()[-1].endswith("s") and "quantize: 50 B in" in err.getvalue()


def test_an_error_takes_the_bar_down():
    console, _, err = make(terminal=True)
    console.start("quantize", 100)
    console.error(ResourceError("disk is full", hint="free some and use --resume"))
    assert err.getvalue().count("\x1b[?25l") == err.getvalue().count("\x1b[?25h")
    assert "quantize: " not in err.getvalue().split("error:")[1]


def test_live_bar_survives_notes_from_many_threads():
    console, _, err = make(terminal=True)
    console.start("quantize", 4000)

    def work() -> None:
        for i in range(10):
            console.advance(100)
            console.note(f"note {i}")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    console.finish()
    assert err.getvalue().count("note ") == 40


def test_ascii_stream_gets_ascii():
    console, out, _ = make(encoding="ascii")
    console.chart("errors → layer", ["a", "b"], [1.0, 0.5], limit=0.7)
    console.sparkline("layers", [0.0, 1.0])
    assert out.getvalue().isascii()
    assert "errors -> layer" in out.getvalue() and "####" in out.getvalue() and "FAIL" in out.getvalue()


def test_a_closed_stdout_ends_no_job():
    class Closed(Stream):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    console = Console(stdout=Closed(), stderr=Stream(), environ={})
    console.line("one")
    console.line("two")


def test_a_full_disk_behind_stdout_is_a_resource_error():
    with open("/dev/full", "w", encoding="utf-8") as full:
        console = Console(stdout=full, stderr=Stream(), environ={})
        with pytest.raises(ResourceError, match="standard output"):
            console.line("one")
        console.line("two")
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


def test_log_records_arrive():
    console, _, err = make(verbose=1)
    logger = logging.getLogger("mxconv.tests.console")
    logger.setLevel(logging.DEBUG)
    handler = console.logging_handler()
    logger.addHandler(handler)
    try:
        logger.warning("scale %s", 3)
        logger.info("detail")
        logger.debug("too deep")
    finally:
        logger.removeHandler(handler)
    assert err.getvalue() == "warning: scale 3\ndetail\n"


SCRIPT = """
import sys
from mxconv.console import Console
console = Console()
console.line("x" * 200)
console.start("convert", 10)
console.file_done("a" * 150, 10)
console.finish()
for i in range(100000): console.line("more")
print("alive", "rich" in sys.modules, "torch" in sys.modules, file=sys.stderr)
"""


def test_in_a_pipe_lines_are_whole_rich_stays_out_and_a_gone_reader_is_no_failure():
    environ = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=pipe, stderr=pipe, text=True, env=environ)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "x" * 200 + "\n"
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(30) == 0
    assert "a" * 150 in said and "alive False False" in said and "Traceback" not in said and "BrokenPipe" not in said
