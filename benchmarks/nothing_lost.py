"""Every promise of the faults suite at its full size, in one command, with what was tried, what survived, and the seconds.

    python benchmarks/nothing_lost.py [--quick] [--only WORD] [--fuzz SECONDS]

Each row is a set of tests run with `--thorough` (or at the size of CI with `--quick`); a test prints its own counts,
lines that begin with `proof:`.
With `--fuzz`, every target of fuzz/inputs.py runs that long too (pip install atheris).
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
    "all corruption is found": ["tests/artifact/test_check.py", "tests/faults/test_check.py"],
    "hostile headers, 100,000 of them, agree with the safetensors package": ["tests/checkpoint"],
    "no traceback: mutated configs, indexes, manifests; 100,000 indexes": [
        "tests/faults/test_never_a_traceback.py", "tests/artifact/test_manifest.py",
    ],
    "every row of the bad-input table, every exit code": [
        "tests/faults/test_bad_input_table.py", "tests/faults/test_exit_codes.py",
    ],
    "no code runs, no path escapes (audit hook)": ["tests/faults/test_audit.py"],
    "verify finds real mistakes": ["tests/verify/test_mutants.py"],
    "signatures, manifest schema and recipes": [
        "tests/faults/test_signature.py", "tests/faults/test_manifest_schema.py", "tests/faults/test_recipes.py",
    ],
}  # fmt: skip
FUZZ_TARGETS = ("headers", "index", "config", "manifest")


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
    counts = re.findall(r"proof: (.+)$", done.stdout, re.MULTILINE)
    if failed:
        print(done.stdout[-20_000:], file=sys.stderr)
    return tried, tried - failed, seconds, counts


def fuzz(target: str, seconds: int) -> tuple[str, bool]:
    """(inputs run, whether none crashed) of one target of fuzz/inputs.py."""
    command = [sys.executable, "fuzz/inputs.py", target, f"-max_total_time={seconds}", "-print_final_stats=1"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    ran = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stdout + done.stderr)
    return (f"{int(ran.group(1)):,}" if ran else "none"), done.returncode == 0 and ran is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the sizes of CI")
    parser.add_argument("--only", default="", metavar="WORD", help="only promises that contain it")
    parser.add_argument("--fuzz", type=int, default=0, metavar="SECONDS", help="run each fuzzing target for so long")
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
    for target in FUZZ_TARGETS if a.fuzz else ():
        inputs, survived = fuzz(target, a.fuzz)
        lost += not survived
        print(f"| fuzzed: {target} | {inputs} | {inputs if survived else 'a crash'} | {a.fuzz} |", flush=True)
    sys.exit(8 if lost else 0)


if __name__ == "__main__":
    main()
