"""Every promise of the faults suite at its full size, in one command, with what was tried, what survived, and the seconds.

    python benchmarks/nothing_lost.py [--quick] [--only WORD]

Each row is a set of tests run with `--thorough` (or at the size of CI with `--quick`); a test prints its own counts with `-s`.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as Xml
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
# promise → the tests that prove it
PROMISES = {
    "final names are right: kill -9 of real jobs, every failpoint, byte-identical resume": ["tests/faults/test_kill.py"],
    "the writer, killed at every step and at random": ["tests/artifact/test_crash.py"],
    "power loss: states of dropped unsynced writes": ["tests/artifact/test_power.py"],
    "SIGINT and SIGTERM end within 5 s, resumable": ["tests/faults/test_interrupt.py"],
    "deterministic": ["tests/faults/test_determinism.py"],
    "disk full is clean": ["tests/faults/test_disk.py", "tests/artifact/test_resources.py"],
    "input/output errors are clean": ["tests/faults/test_io_errors.py"],
    "bounded memory": ["tests/faults/test_memory.py"],
    "all corruption is found": ["tests/artifact/test_check.py"],
    "hostile headers are safe": ["tests/checkpoint"],
    "verify finds real mistakes": ["tests/verify/test_mutants.py"],
}


def prove(tests: list[str], quick: bool) -> tuple[int, int, float, list[str]]:
    """(tests tried, survived, seconds, what the tests printed of their counts)."""
    with tempfile.TemporaryDirectory(prefix="mxconv-lost-") as folder:
        report = Path(folder) / "report.xml"
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", f"--junitxml={report}",
             f"--basetemp={folder}/tmp",
             *([] if quick else ["--thorough"]), *tests],
            cwd=REPOSITORY, env={**os.environ, "CI": "true"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        seconds = time.monotonic() - began
        suite = Xml.parse(report).getroot().find("testsuite")
    if suite is None:
        raise SystemExit(done.stdout)
    tried = int(suite.get("tests", 0)) - int(suite.get("skipped", 0))
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    counts = re.findall(r"^\W*s?\.?((?:convert|quantize): .+)$", done.stdout, re.MULTILINE)
    return tried, tried - failed, seconds, counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the sizes of CI")
    parser.add_argument("--only", default="", metavar="WORD", help="only promises that contain it")
    a = parser.parse_args()
    lost = 0
    print("| promise | tests tried | survived | seconds |\n|---|---|---|---|")
    for promise, tests in PROMISES.items():
        if a.only in promise:
            tried, survived, seconds, counts = prove(tests, a.quick)
            lost += tried - survived
            print(f"| {promise} | {tried} | {survived} | {seconds:.0f} |", flush=True)
            for count in counts:
                print(f"|   {count} | | | |", flush=True)
    sys.exit(8 if lost else 0)


if __name__ == "__main__":
    main()
