"""Calibration tokens: text or ids, as windows of int32 ids [N, T]."""

from __future__ import annotations

import hashlib
import io
import math
from pathlib import Path

import numpy as np

from mxconv.apart import run_apart
from mxconv.data import calibration_text
from mxconv.errors import IncompleteInput, MalformedInput, UsageError, printable
from mxconv.jsonfiles import read_regular
from mxconv.text import Tokenizer

WINDOW = 512
MAX_TOKENS = 1 << 24
"""More than anybody can run a model on: hidden states of that many tokens take 400 GB for MiniMax-M1."""
MAX_TEXT_BYTES = 4 * MAX_TOKENS
EXPECTED_IDS = "integers [windows, tokens] or 1-D"
MAX_IDS_BYTES = 8 * MAX_TOKENS + (1 << 16)


def load_tokens(source: Path, calibration: Path | None, vocabulary: int, *, window: int = WINDOW) -> np.ndarray:
    """int32 [N, T]: the ids of `calibration` (`.npy` of integer ids [N, T] or 1-D; else a text file), or of the built-in text.

    1-D ids and text are cut into windows of `window`; a remainder is left out unless it is all there is.
    Raises UsageError when text is given and no tokenizer lies beside the model, MalformedInput for ids outside the vocabulary.
    """
    if calibration is not None and calibration.suffix == ".npy":
        return check_ids(_read_npy(calibration), vocabulary, str(calibration), window)
    tokenizer = Tokenizer.open(source)
    if tokenizer is None:
        raise UsageError(
            "this scheme calibrates activations, and there is no tokenizer.json to read text with", where=source,
            hint="token ids work without a tokenizer: --calibration ids.npy (integers, [windows, tokens] or 1-D)",
        )  # fmt: skip
    text = calibration_text() if calibration is None else read_text(calibration)
    ids = run_apart(lambda wanted: tokenizer.encode(text))  # 20 MB of text take half a minute
    return check_ids(np.array(ids, dtype=np.int64), vocabulary, str(calibration or "the built-in text"), window)


def read_text(path: Path) -> str:
    """The UTF-8 text of a regular file. Raises IncompleteInput or MalformedInput."""
    try:
        return _content(path, MAX_TEXT_BYTES, "text").decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedInput(f"text is not UTF-8: {error.reason} at byte {error.start}", where=path) from None


def _content(path: Path, limit_bytes: int, thing: str) -> bytes:
    try:
        return read_regular(path, limit_bytes)
    except IncompleteInput:
        raise IncompleteInput(f"cannot read the {thing}: there is no such file", where=path) from None


def _read_npy(path: Path) -> np.ndarray:
    """The array of a `.npy` file, whose header must be true before anything is allocated by it."""
    content = _content(path, MAX_IDS_BYTES, "ids")
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version}")
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(stream)
    except Exception as error:  # numpy has the header read by ast and tokenize, which have many
        raise MalformedInput(f"not a .npy file of numbers: {printable(error)}", where=path) from None
    if dtype.hasobject or dtype.kind not in "iu":
        raise MalformedInput("not token ids", where=path, expected=EXPECTED_IDS, got=f"{dtype} {list(shape)}")
    size, stated = len(content) - stream.tell(), math.prod(shape) * dtype.itemsize
    if size != stated or min(shape, default=0) < 0:
        what = ".npy file does not hold what its header says"
        raise MalformedInput(what, where=path, expected=f"{stated} bytes", got=f"{size} bytes")
    values = np.frombuffer(content, dtype, offset=stream.tell())
    return values.reshape(shape, order="F" if fortran else "C")


def check_ids(ids: np.ndarray, vocabulary: int, where: str, window: int = WINDOW) -> np.ndarray:
    """`ids` as int32 [N, T]; 1-D ids are cut. Raises MalformedInput when they are no ids of this vocabulary."""
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2) or not ids.size:
        raise MalformedInput("not token ids", where=where, expected=EXPECTED_IDS, got=f"{ids.dtype} {list(ids.shape)}")
    if ids.size > MAX_TOKENS:
        what = "more token ids than a model can be run on"
        raise MalformedInput(what, where=where, expected=f"at most {MAX_TOKENS}", got=ids.size)
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise MalformedInput(
            "a token id is outside the vocabulary", where=where, expected=f"0 … {vocabulary - 1}", got=f"{ids.min()} … {ids.max()}"
        )
    if ids.ndim == 1:
        length = min(window, len(ids))
        ids = ids[: len(ids) // length * length].reshape(-1, length)
    return np.ascontiguousarray(ids, dtype=np.int32)


def tokens_digest(ids: np.ndarray) -> str:
    """SHA-256 (hex) of the shape and the little-endian int32 ids."""
    return hashlib.sha256(repr(ids.shape).encode() + np.ascontiguousarray(ids, dtype="<i4").tobytes()).hexdigest()
