"""Calibration tokens: text or ids, as windows of int32 ids [N, T]."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from mxconv.data import calibration_text
from mxconv.errors import IncompleteInput, MalformedInput, UsageError
from mxconv.text import Tokenizer

WINDOW = 512
MAX_TEXT_BYTES = 1 << 30


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
    return check_ids(np.array(tokenizer.encode(text), dtype=np.int64), vocabulary, str(calibration or "the built-in text"), window)


def read_text(path: Path) -> str:
    """The UTF-8 text of a file. Raises IncompleteInput or MalformedInput."""
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise MalformedInput("text is too large", where=path, expected=f"at most {MAX_TEXT_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise IncompleteInput(f"cannot read the text: {error.strerror}", where=path) from None
    except UnicodeDecodeError as error:
        raise MalformedInput(f"text is not UTF-8: {error.reason} at byte {error.start}", where=path) from None


def _read_npy(path: Path) -> np.ndarray:
    try:
        values = np.load(path, allow_pickle=False)
    except OSError as error:
        raise IncompleteInput(f"cannot read the ids: {error.strerror or error}", where=path) from None
    except ValueError as error:
        raise MalformedInput(f"not a .npy file of numbers: {error}", where=path) from None
    if not isinstance(values, np.ndarray):
        raise MalformedInput("not a .npy file", where=path)
    return values


def check_ids(ids: np.ndarray, vocabulary: int, where: str, window: int = WINDOW) -> np.ndarray:
    """`ids` as int32 [N, T]; 1-D ids are cut. Raises MalformedInput when they are no ids of this vocabulary."""
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2) or not ids.size:
        raise MalformedInput(
            "not token ids", where=where, expected="integers [windows, tokens] or 1-D", got=f"{ids.dtype} {list(ids.shape)}"
        )
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
