"""Text to token ids and back, through the `tokenizers` package and the files beside a checkpoint.

Read: `tokenizer.json` (the tokenizer; nothing else can stand in for it), `tokenizer_config.json` and `special_tokens_map.json`
(names of special tokens), `generation_config.json` and `config.json` (end-of-sequence ids), `chat_template.jinja`. These
files are input like any other: what is broken in them is MalformedInput with the file's name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mxconv.chat import ChatTemplate
from mxconv.errors import MalformedInput, MxconvError, UsageError, printable
from mxconv.jsonfiles import read_json, read_regular

if TYPE_CHECKING:
    import tokenizers

MAX_TOKENIZER_BYTES = 256 << 20
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def cut_windows(ids: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
    """`ids` cut into whole windows: int64 [N, length]; a rest shorter than `length` is left out.

    Raises UsageError when there is not even one window.
    """
    flat = np.asarray(ids, dtype=np.int64).reshape(-1)
    windows = len(flat) // length
    if windows == 0:
        raise UsageError("too few tokens for one window", expected=f"at least {length}", got=len(flat), hint="give a longer text")
    return flat[: windows * length].reshape(windows, length)


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Failures of the tokenizers package are the file's: its panics derive from BaseException, its errors from plain Exception."""
    try:
        yield
    except (MxconvError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise MalformedInput(f"tokenizer cannot be used: {printable(error)}", where=path) from None


def _optional_object(path: Path) -> Mapping[str, Any]:
    """The JSON object in `path`, empty when there is no such file."""
    if not path.exists():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise MalformedInput("not a JSON object", where=path, got=type(content).__name__)
    return content


def _special_tokens(folder: Path) -> dict[str, str]:
    """Name (`eos_token`) → text, from tokenizer_config.json, then special_tokens_map.json; a token is a text or an AddedToken."""
    found: dict[str, str] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        for key, value in _optional_object(folder / name).items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                found.setdefault(key, text)
    return found


def _stated_eos(folder: Path) -> tuple[tuple[int, ...], str] | None:
    """End-of-sequence ids and the file that says them: generation_config.json before config.json."""
    for name in ("generation_config.json", "config.json"):
        value = _optional_object(folder / name).get("eos_token_id")
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            expected = "a token id or a list of them"
            raise MalformedInput("eos_token_id is wrong", where=folder / name, expected=expected, got=repr(value))
        if ids:
            return tuple(ids), name
    return None


class Tokenizer:
    """One checkpoint's tokenizer; `Tokenizer.open` makes it.

    `vocab_size` is the highest token id plus one: the rows that an embedding must have. `eos_ids` end a generation, and
    `eos_from` is the file that says so (None: no file does). `special` maps `bos_token`, `eos_token` … to their text.
    `chat` renders messages, None when the checkpoint has no chat template. `notes` is what a user should be told.
    """

    def __init__(self, folder: Path, backend: tokenizers.Tokenizer) -> None:
        self.path = folder / "tokenizer.json"
        self._backend = backend
        self.special = _special_tokens(folder)
        with _blaming(self.path):
            ids = backend.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1
        self.notes: tuple[str, ...] = ()
        self.eos_ids, self.eos_from = self._eos(folder)
        self.chat = ChatTemplate.open(folder, self.special)

    @classmethod
    def open(cls, folder: str | Path) -> Tokenizer | None:
        """The tokenizer of `folder`; None when there is no tokenizer.json. Raises MalformedInput for a broken or hostile file."""
        path = Path(folder) / "tokenizer.json"
        if not path.exists():
            return None
        content = read_regular(path, MAX_TOKENIZER_BYTES)
        import tokenizers

        with _blaming(path):
            backend = tokenizers.Tokenizer.from_buffer(content)
            backend.no_truncation()  # a stored limit would cut texts silently
            backend.no_padding()
        return cls(Path(folder), backend)

    def _eos(self, folder: Path) -> tuple[tuple[int, ...], str | None]:
        stated = _stated_eos(folder)
        if stated is not None:
            return stated
        text = self.special.get("eos_token")
        if text is None:
            return (), None
        number = self.token_id(text)
        if number is None:
            self.notes += (f"the end-of-sequence token {printable(text)!r} is not in the tokenizer's vocabulary",)
            return (), None
        return (number,), "tokenizer_config.json"

    def token_id(self, token: str) -> int | None:
        """The id of one token by its text, None when it is none."""
        return self._backend.token_to_id(token)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`. `special`: with the tokens that the tokenizer itself adds (a text that a chat template made
        has them already). Special tokens written out in the text become their ids either way.

        Raises UsageError for a text that is not Unicode (a lone surrogate, from undecodable bytes on a command line).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError("text is not valid Unicode", where=f"character {error.start}", hint="give it in UTF-8") from None
        with _blaming(self.path):
            # a batch of one: unlike `encode` it lets other threads run meanwhile, so that a long text can be given up
            return list(self._backend.encode_batch([text], add_special_tokens=special)[0].ids)

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of `ids`; bytes that form no character become U+FFFD, ids that the tokenizer lacks nothing.

        `special`: with the special tokens' own text.
        """
        with _blaming(self.path):
            return str(self._backend.decode([int(i) for i in ids], skip_special_tokens=not special))

    def stream(self, *, special: bool = False) -> StreamDecoder:
        """A decoder for ids that come one at a time."""
        return StreamDecoder(self, special=special)


class StreamDecoder:
    """Text as the ids come; never half a character. The pieces and the rest of `flush` together are `decode` of all ids.

    A piece is the difference between two decodings of a short window that begins one piece early, because some tokenizers
    decode the first token of a text in another way. A text that ends in U+FFFD may end inside a character and is held back.
    """

    def __init__(self, tokenizer: Tokenizer, *, special: bool = False) -> None:
        self._tokenizer, self._special = tokenizer, special
        self._ids: list[int] = []
        self._known = 0
        """Ids at the head of the window whose text was given in an earlier piece."""
        self._sent = 0
        """Characters of the window's text that were given."""

    def push(self, token: int) -> str:
        """The text that `token` completes, often empty."""
        self._ids.append(int(token))
        text = self._tokenizer.decode(self._ids, special=self._special)
        whole = text.rstrip(REPLACEMENT)
        piece = whole[self._sent :]
        self._sent = max(self._sent, len(whole))
        if len(whole) == len(text) and piece:
            del self._ids[: self._known]
            self._known = len(self._ids)
            self._sent = len(self._tokenizer.decode(self._ids, special=self._special))
        return piece

    def flush(self) -> str:
        """What is still held back; the decoder is as new afterwards."""
        rest = self._tokenizer.decode(self._ids, special=self._special)[self._sent :]
        self._ids, self._known, self._sent = [], 0, 0
        return rest
