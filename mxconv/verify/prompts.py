"""The tokens that logits are compared on: windows of ids from a file, a text, the recorded calibration, or a seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mxconv.calibrate.tokens import check_ids, read_text, tokens_digest
from mxconv.data import evaluation_text
from mxconv.errors import IncompleteInput, MalformedInput, MxconvError, UsageError
from mxconv.text import Tokenizer, cut_windows
from mxconv.verify.activation import read_ids, recorded_tokens
from mxconv.verify.options import Options


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """int64 ids [windows, T] and where they come from; `natural` says that perplexities on them mean something."""

    ids: Tensor
    words: str
    natural: bool

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of shape and ids."""
        return tokens_digest(self.ids.numpy())


def choose_prompts(artifact: Path, vocabulary: int, options: Options) -> Prompts:
    """The first that there is of: `options.tokens`, `options.text`, the built-in text with the artifact's or the source's
    tokenizer, the recorded calibration ids, ids drawn from `options.seed`.

    Raises UsageError for a text without a tokenizer and for tokens too few for one window, MalformedInput for ids that do not fit.
    """
    if options.tokens is not None:
        return _limited(_from_file(options.tokens, vocabulary, options), f"ids of {options.tokens.name}", options, natural=True)
    tokenizer = _tokenizer((artifact, options.source))
    if options.text is not None and tokenizer is None:
        raise UsageError(
            "there is no tokenizer.json to read a text with", where=artifact, hint="token ids work without one: --tokens ids.npy"
        )
    if tokenizer is not None:
        text = evaluation_text() if options.text is None else read_text(options.text)
        ids = cut_windows(tokenizer.encode(text), options.window)
        check_ids(ids, vocabulary, "the tokenizer's ids")
        return _limited(ids, "the built-in text" if options.text is None else options.text.name, options, natural=True)
    try:
        ids = cut_windows(recorded_tokens(artifact, vocabulary), options.window)
    except (IncompleteInput, MalformedInput, UsageError):
        random = np.random.default_rng(options.seed).integers(0, vocabulary, (options.windows, options.window))
        return _limited(random, f"random ids of seed {options.seed}", options, natural=False)
    return _limited(ids, "the recorded calibration ids", options, natural=True)


def _tokenizer(folders: tuple[Path | None, ...]) -> Tokenizer | None:
    """The first usable tokenizer; a broken one in the artifact is a finding of the structure section."""
    for folder in folders:
        try:
            found = None if folder is None else Tokenizer.open(folder)
        except MxconvError:
            continue
        if found is not None:
            return found
    return None


def _from_file(path: Path, vocabulary: int, options: Options) -> np.ndarray:
    ids = check_ids(read_ids(path), vocabulary, str(path), options.window)
    if ids.shape[1] < 2:
        raise UsageError("windows must have at least two tokens", where=path, got=ids.shape[1])
    return ids.astype(np.int64)


def _limited(ids: np.ndarray, words: str, options: Options, *, natural: bool) -> Prompts:
    return Prompts(ids=torch.from_numpy(np.ascontiguousarray(ids[: options.windows], dtype=np.int64)), words=words, natural=natural)
