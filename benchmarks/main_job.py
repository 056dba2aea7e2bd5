"""Every figure of the main job that the README quotes, in one command.

    python benchmarks/main_job.py [--models demo=PATH tiny-a=PATH …] [--expected FOLDER] [--reference FOLDER] [--json FILE]

For each model and scheme: quantize and verify as a user runs them (processes of their own): seconds, peak resident memory, KL,
top-1 agreement, perplexity change. For each model with expected logits: the runtime's relative L2 in float32 and float64.
`--help` and `inspect` on the real index are timed too. Without arguments: the bundled demo model alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SCHEMES = ("w4afp8", "w4afp8_static", "w4a8", "block_wise_fp8", "tensor_wise_fp8")
LARGEST_TP = {"demo": 2, "tiny-a": 8}


def run(*arguments: object) -> tuple[int, str, float, int]:
    """(exit code, stdout, seconds, peak RSS in bytes) of one `mxconv` process."""
    began = time.monotonic()
    command = [sys.executable, "-m", "mxconv", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    output = process.stdout.read().decode() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    return os.waitstatus_to_exitcode(status), output, time.monotonic() - began, usage.ru_maxrss << 10


def job(model: Path, scheme: str, tp: int, work: Path) -> dict[str, Any]:
    """One scheme on one model, quantized and verified."""
    out = work / f"{model.name}-{scheme}"
    code, _, seconds, memory = run("quantize", model, out, "--scheme", scheme, "--tp", tp)
    if code:
        raise SystemExit(f"quantize {model} {scheme} exited {code}")
    verified, document, verify_seconds, verify_memory = run("verify", out, "--source", model, "--json")
    lane = json.loads(document)["sections"]["logits"]["figures"]["lanes"]["as served"]
    return {
        "scheme": scheme, "tp": tp, "quantize_seconds": seconds, "quantize_rss": memory, "verify_seconds": verify_seconds,
        "verify_rss": verify_memory, "verify_exit": verified, "kl": lane["kl"]["mean"], "kl_99": lane["kl"]["quantiles"]["99%"],
        "top1": lane["top1"]["mean"], "perplexity_change": lane["perplexity_change"]["mean"],
    }  # fmt: skip


def runtime_error(model: Path, expected: Path) -> dict[str, float]:
    """Relative L2 of the runtime's logits against the expected ones."""
    import numpy as np
    import torch

    from mxconv.runtime import load

    stored = np.load(expected)
    found = {}
    for dtype in (torch.float32, torch.float64):
        loaded = load(model, dtype=dtype)
        for name, last in (("short", None), ("long", 16)):
            logits = loaded(torch.from_numpy(stored[f"{name}_ids"]).long(), last=last).double()
            wanted = torch.from_numpy(stored["short_logits" if last is None else "long_logits_last16"]).double()
            found[f"{str(dtype).split('.')[1]} {name}"] = float((logits - wanted).norm() / wanted.norm())
    return found


def best_of(times: int, *arguments: object) -> float:
    """The quickest of some runs, in seconds."""
    return min(run(*arguments)[2] for _ in range(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=[], metavar="NAME=PATH")
    parser.add_argument("--expected", type=Path, help="folder of NAME-expected.npz")
    parser.add_argument("--reference", type=Path, help="folder of the real config and index")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    from mxconv.data import demo_model

    models = dict(pair.split("=", 1) for pair in a.models) or {"demo": str(demo_model())}
    report: dict[str, Any] = {"help_seconds": best_of(5, "--help"), "models": {}}
    print(f"--help {report['help_seconds'] * 1e3:.0f} ms")
    if a.reference:
        report["inspect_seconds"] = best_of(3, "inspect", a.reference, "--scheme", "w4afp8", "--tp", "8")
        print(f"inspect --scheme w4afp8 --tp 8 of the real index {report['inspect_seconds']:.2f} s")
    with tempfile.TemporaryDirectory(prefix="mxconv-bench-") as folder:
        for name, path in models.items():
            entry: dict[str, Any] = {"schemes": []}
            if a.expected and (a.expected / f"{name}-expected.npz").exists():
                # in a process of its own: a child's peak memory begins at that of the process that forks it
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    entry["runtime"] = pool.apply(runtime_error, (Path(path), a.expected / f"{name}-expected.npz"))
                print(name, " ".join(f"{key} {value:.2e}" for key, value in entry["runtime"].items()))
            print("| model | scheme | tp | KL | KL 99 % | top-1 | Δppl | quantize | verify | exit |\n" + "|---" * 10 + "|")
            for scheme in SCHEMES:
                row = job(Path(path), scheme, LARGEST_TP.get(name, 2), Path(folder))
                entry["schemes"].append(row)
                print(
                    f"| {name} | `{scheme}` | {row['tp']} | {row['kl']:.2e} | {row['kl_99']:.3f} | {100 * row['top1']:.1f} % | "
                    f"{100 * row['perplexity_change']:+.2f} % | {row['quantize_seconds']:.1f} s, {row['quantize_rss'] >> 20} MiB | "
                    f"{row['verify_seconds']:.1f} s, {row['verify_rss'] >> 20} MiB | {row['verify_exit']} |",
                    flush=True,
                )
            report["models"][name] = entry
    if a.json:
        a.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
