"""A coverage-guided fuzzer (atheris) of everything that reads what nobody vouches for. Not part of the tests: it has a time budget.

    pip install atheris
    python fuzz/inputs.py headers -max_total_time=600            # safetensors headers, against the safetensors package
    python fuzz/inputs.py index -max_total_time=600              # model.safetensors.index.json of a folder with two shards
    python fuzz/inputs.py config -max_total_time=600             # config.json
    python fuzz/inputs.py manifest -max_total_time=600           # manifest.json

Each target ends in a value or an MxconvError with code 2, 3, 4, 7 or 8; anything else is a crash, which libFuzzer saves as
`crash-…` (give that file as the argument to see it again). What the header parser accepts, the package must accept too.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

import atheris

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

with atheris.instrument_imports(include=["mxconv"]):
    from mxconv.artifact.manifest import parse_manifest, render
    from mxconv.checkpoint import parse_header, read_shards
    from mxconv.config import read_config
    from mxconv.errors import MxconvError

import safetensors  # noqa: E402

from tests.checkpoint.raw import entry, file_bytes, write_sharded  # noqa: E402

ALLOWED = {2, 3, 4, 7, 8}
SCRATCH = Path(tempfile.mkdtemp(prefix="mxconv-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
INDEX = "model.safetensors.index.json"


def allowed(error: MxconvError) -> None:
    """Every problem must be one that input can have, and safe to print."""
    if error.exit_code not in ALLOWED:
        raise AssertionError(f"exit code {error.exit_code}: {error}") from error
    if not all(c.isprintable() or c == "\n" for c in error.render()):
        raise AssertionError(f"a control character in {error.render()!r}")


def headers(data: bytes) -> None:
    """A header, and data of the size that it asks for as long as that is small."""
    try:
        header = parse_header(data, "x.safetensors")
    except MxconvError as error:
        allowed(error)
        return
    for problem in header.problems:
        allowed(problem)
    if not header.problems and header.data_bytes < 1 << 16:
        raw = file_bytes(data, b"\0" * header.data_bytes)
        safetensors.deserialize(raw)  # an exception here is a header that we accept and the package does not


def index(data: bytes) -> None:
    """An index over two right shards."""
    (SCRATCH / INDEX).write_bytes(data)
    shards = read_shards(SCRATCH)
    for problem in shards.problems:
        allowed(problem)
    if not shards.problems and shards.present:
        for name, file in (shards.index or {}).items():
            if name not in dict(safetensors.deserialize((SCRATCH / file).read_bytes())):
                raise AssertionError(f"{name!r} is accepted in {file!r}")


def config(data: bytes) -> None:
    """A config.json."""
    path = SCRATCH / "config.json"
    path.write_bytes(data)
    try:
        read_config(path.parent)
    except MxconvError as error:
        for each in getattr(error, "problems", (error,)):
            allowed(each)


def manifest(data: bytes) -> None:
    """A manifest, sealed with the digest that it needs to be looked at."""
    try:
        value = json.loads(data.decode("utf-8"))
        if not isinstance(value, dict) or not isinstance(value.get("files"), dict):
            return
        body = {key: part for key, part in value.items() if key != "sha256"}
        sealed = {**body, "sha256": hashlib.sha256(render(body)).hexdigest()}
        parse_manifest(render(sealed), sealed, "manifest.json")
    except MxconvError as error:
        allowed(error)
    except (ValueError, RecursionError):  # the reader's part, which refuses what is no JSON
        pass


MANIFEST = {
    "schema": "mxconv-manifest/1", "plan_digest": "0" * 64,
    "files": {"x": {"size_bytes": 1, "sha256": "0" * 64, "tensors": {"a": {"dtype": "U8", "shape": [1], "sha256": "0" * 64}}}},
}  # fmt: skip
TARGETS = {"headers": headers, "index": index, "config": config, "manifest": manifest}


def seeds(target: str) -> Path:
    """A folder of right inputs to begin with."""
    folder = SCRATCH / f"seeds-{target}"
    folder.mkdir()
    demo = REPOSITORY / "mxconv" / "data" / "demo"
    header = json.dumps({"__metadata__": {"format": "pt"}, "a": entry("BF16", (2, 3), 0, 12), "b": entry("F32", (), 12, 16)})
    texts = {
        "headers": [header.encode(), b"{}"],
        "index": [(SCRATCH / INDEX).read_bytes()],
        "config": [(demo / "config.json").read_bytes()],
        "manifest": [json.dumps(MANIFEST).encode()],
    }
    for number, text in enumerate(texts[target]):
        (folder / str(number)).write_bytes(text)
    return folder


def main() -> None:
    """`inputs.py TARGET [libFuzzer options] [corpus folders]`."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: {sys.argv[0]} {'|'.join(TARGETS)} [-max_total_time=SECONDS] [corpus]")
    target = sys.argv.pop(1)
    write_sharded(SCRATCH, {"model-1.safetensors": {"a": b"12", "b": b"3"}, "model-2.safetensors": {"c": b"456"}})
    again = any(Path(word).is_file() for word in sys.argv[1:])
    atheris.Setup([*sys.argv, "-max_len=4096", *([] if again else [str(seeds(target))])], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
