"""Where the time of a run of `mxconv quantize` goes: `python -m benchmarks.quantize_phases FOLDER`.

FOLDER is what benchmarks/make_layer.py writes. The run is made in this process with its functions timed, each without what it calls
that has a row of its own. Rows are seconds of all threads together; wall seconds stand above. What is not listed is waiting for
work. Both devices are run in turn where --device is not given and there is a GPU.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()
import torch  # noqa: E402

from mxconv.artifact import parts, writer  # noqa: E402
from mxconv.checkpoint.reader import ByteReader  # noqa: E402
from mxconv.execute import RunOptions, lanes, places, quantize, reading, run  # noqa: E402

IMPORTED = time.perf_counter() - BEGAN


class Clock:
    """Seconds by label: each call's without those of timed calls inside it, and without what it waits for elsewhere."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._lock = threading.Lock()
        self._own = threading.local()

    def timed(self, work: Callable[..., Any], label: str) -> Callable[..., Any]:
        """`work`, counted under `label`."""

        @functools.wraps(work)
        def call(*arguments: Any, **named: Any) -> Any:
            outer = getattr(self._own, "inside", 0.0)
            self._own.inside = 0.0
            began = time.perf_counter()
            try:
                return work(*arguments, **named)
            finally:
                took = time.perf_counter() - began
                with self._lock:
                    self.seconds[label] += took - self._own.inside
                self._own.inside = outer + took

        return call

    def patch(self, owner: Any, name: str, label: str) -> None:
        """Time `owner.name` from now on."""
        setattr(owner, name, self.timed(getattr(owner, name), label))


class TimedHash:
    """SHA-256 of the source, counted."""

    clock: Clock

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.update = self.clock.timed(self._hash.update, "units: SHA-256 of the source")
        self.hexdigest = self._hash.hexdigest


TIMED: Sequence[tuple[Any, str, str]] = (
    (ByteReader, "read", "units: read"),
    (places.Host, "observe", "units: encode"),
    (places.Host, "encode_into", "units: encode"),
    (lanes.Lane, "room", "units: wait until a pinned block has travelled"),
    (places.OnDevice, "put", "units: issue copies and kernels"),
    (places.OnDevice, "observe", "units: issue copies and kernels"),
    (places.OnDevice, "encode_into", "units: issue copies and kernels"),
    (places.OnDevice, "fetch", "units: wait for the outputs of the GPU"),
    (places.Places, "_lane", "units: streams"),
    (parts.Parts, "write", "units: SHA-256 of the outputs"),
    (parts, "write_box", "units: write"),
    (parts, "start_writeback", "units: start write-back"),
    (writer.ArtifactWriter, "commit", "units: journal"),
    (run, "run_copy", "units: arrange copied tensors"),
    (run, "_run_unit", "units: the rest"),
    (parts, "hash_file", "files: SHA-256, of the file and its tensors"),
    (parts.os, "fdatasync", "files: fdatasync"),
    (run, "_run_units", "wall: units"),
    (run, "_publish", "wall: the last files, manifest"),
)


def phases(source: Path, scheme: str, device: str, workers: int) -> dict[str, float]:
    """Seconds of one run by label."""
    clock = TimedHash.clock = Clock()
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in TIMED]
    operations = dict(run.OPERATIONS)
    for owner, name, label in TIMED:
        clock.patch(owner, name, label)
    run.OPERATIONS = {**operations, "copy": run.run_copy}
    findings = reading.Findings.__init__
    reading.Findings.__init__ = lambda self, **named: findings(self, sha256=TimedHash(), **named)
    folder = Path(tempfile.mkdtemp(prefix="mxconv-", dir=source.parent))
    os.sync()
    began = time.perf_counter()
    try:
        options = RunOptions(workers=workers, memory_bytes=8 << 30)
        quantize(source, folder / "out", scheme=scheme, tp=8, device=device, options=options)
        return {"wall: all": time.perf_counter() - began, **clock.seconds}
    finally:
        reading.Findings.__init__, run.OPERATIONS = findings, operations
        for owner, name, original in before:
            setattr(owner, name, original)
        shutil.rmtree(folder)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--device", nargs="*")
    parser.add_argument("--scheme", default="w4afp8")
    parser.add_argument("--workers", type=int, default=8)
    a = parser.parse_args()
    subprocess.run(["cat", *map(str, sorted(a.source.iterdir()))], stdout=subprocess.DEVNULL, check=True)  # into the page cache
    print(f"imports: {IMPORTED:.2f} s; {a.scheme}, {a.workers} workers, {os.cpu_count()} cores", flush=True)
    for device in a.device or (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]):
        found = phases(a.source, a.scheme, device, a.workers)
        print(f"\n| {device} | s |\n|---|---|")
        order = ("wall", "units", "files")
        for label in sorted(found, key=lambda label: (order.index(label.split(":")[0]), -found[label])):
            print(f"| {label} | {found[label]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
