"""Text to ids and back: the bundled tokenizer, broken ones, streamed decoding."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxconv.data import demo_model
from mxconv.errors import MalformedInput, UsageError
from mxconv.text import REPLACEMENT, Tokenizer, cut_windows

TEXT = "def f(x):\n    return 'é 世界 🤖 \u0301' # Ω\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    opened = Tokenizer.open(demo_model())
    assert opened is not None
    return opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(demo_model() / name, tmp_path / name)
    return tmp_path


def edit(path: Path, **changes) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def test_ids_are_those_of_transformers(tokenizer):
    transformers = pytest.importorskip("transformers")
    peer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(demo_model() / "tokenizer.json"))
    ids = tokenizer.encode(TEXT)
    assert ids == peer(TEXT)["input_ids"]
    assert tokenizer.decode(ids) == TEXT == peer.decode(ids, clean_up_tokenization_spaces=False)
    assert tokenizer.vocab_size == len(peer) == 4096


def test_no_tokenizer(tmp_path):
    assert Tokenizer.open(tmp_path) is None


def test_special_tokens_are_dropped_from_text_unless_asked(tokenizer):
    ids = [tokenizer.token_id("<end_of_sentence>"), *tokenizer.encode("x")]
    assert ids[0] == 2
    assert tokenizer.decode(ids) == "x"
    assert tokenizer.decode(ids, special=True) == "<end_of_sentence>x"


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(UsageError, match="not valid Unicode"):
        tokenizer.encode("a\udcff")


def test_stored_truncation_and_padding_do_not_apply(folder):
    edit(
        folder / "tokenizer.json",
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
            "pad_token": "<end_of_document>",
        },
    )  # fmt: skip
    opened = Tokenizer.open(folder)
    assert opened is not None and opened.decode(opened.encode(TEXT)) == TEXT


def test_vocab_size_counts_to_the_highest_id(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 4096, "content": "<extra>"})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    opened = Tokenizer.open(folder)
    assert opened is not None and opened.vocab_size == 4097 and opened.encode("<extra>") == [4096]


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer_config", "expected"),
    [
        ([3, 5], 7, "<end_of_sentence>", ((3, 5), "generation_config.json")),
        (None, 7, "<end_of_sentence>", ((7,), "config.json")),
        (None, None, "<end_of_sentence>", ((2,), "tokenizer_config.json")),
        (None, None, {"content": "<begin_of_document>"}, ((3,), "tokenizer_config.json")),
        (None, None, None, ((), None)),
        (0, 7, None, ((0,), "generation_config.json")),
    ],
)
def test_end_of_sequence(folder, generation, config, tokenizer_config, expected):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    edit(folder / "config.json", eos_token_id=config)
    edit(folder / "tokenizer_config.json", eos_token=tokenizer_config)
    opened = Tokenizer.open(folder)
    assert opened is not None and (opened.eos_ids, opened.eos_from) == expected and opened.notes == ()


def test_an_unknown_end_of_sequence_token_is_noted(folder):
    edit(folder / "tokenizer_config.json", eos_token="<nowhere>")
    opened = Tokenizer.open(folder)
    assert opened is not None and opened.eos_ids == () and "<nowhere>" in opened.notes[0]


def test_special_tokens_map_fills_gaps(folder):
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<unused>", "pad_token": {"content": "<pad>"}}))
    opened = Tokenizer.open(folder)
    assert opened is not None
    assert opened.special["pad_token"] == "<pad>" and opened.special["eos_token"] == "<end_of_sentence>"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"[1, 2"),
        ("tokenizer.json", b"\xff\xfe\x00"),
        ("tokenizer.json", b"[" * 200_000),
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "Nonsense"}}'),
        ("tokenizer.json", b'{"version": "9.9", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}'),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"eos_token": "a", "eos_token": "b"}'),
        ("config.json", b'{"eos_token_id": "two"}'),
        ("config.json", b'{"eos_token_id": [true]}'),
        ("generation_config.json", b'{"eos_token_id": -1}'),
        ("special_tokens_map.json", b"nonsense"),
    ],
)
def test_broken_files_are_malformed_input_and_named(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(MalformedInput) as caught:
        Tokenizer.open(folder)
    assert name in str(caught.value) and caught.value.exit_code == 3


def test_a_fifo_is_not_waited_for(folder):
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(MalformedInput, match="not a regular file"):
        Tokenizer.open(folder)


def streamed(tokenizer: Tokenizer, ids: list[int], special: bool) -> list[str]:
    stream = tokenizer.stream(special=special)
    return [*(stream.push(i) for i in ids), stream.flush()]


def test_stream_never_gives_half_a_character(tokenizer):
    text = "🤖🤖é世界 naïve Ωmega 🧵"
    pieces = streamed(tokenizer, tokenizer.encode(text), False)
    assert "".join(pieces) == text and not any(REPLACEMENT in piece for piece in pieces)
    assert len(pieces) > len(text), "characters of several bytes are several tokens here, so the test bites"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 4095), st.integers(0, 260)), max_size=40), st.booleans())
def test_streamed_pieces_are_the_whole_text(ids, special):
    tokenizer = Tokenizer.open(demo_model()) if not OPENED else OPENED[0]
    assert tokenizer is not None
    OPENED[:] = [tokenizer]
    assert "".join(streamed(tokenizer, ids, special)) == tokenizer.decode(ids, special=special)


OPENED: list[Tokenizer] = []


def byte_fallback(folder: Path) -> Tokenizer:
    """A tokenizer of the other kind: words with a space mark, bytes as <0xNN> tokens, the leading space stripped."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁a": 256, "▁bc": 257, "d": 258}
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]  # fmt: skip
    model = {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True, "unk_token": None}
    content = {"version": "1.0", "added_tokens": [], "model": model, "decoder": {"type": "Sequence", "decoders": decoders}}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    opened = Tokenizer.open(folder)
    assert opened is not None
    return opened


def test_stream_of_a_tokenizer_with_space_marks_and_byte_tokens(tmp_path):
    tokenizer = byte_fallback(tmp_path)
    ids = [256, 257, 258, *"é🤖".encode(), 256, 258]
    assert tokenizer.decode(ids) == "a bcdé🤖 ad"
    assert streamed(tokenizer, ids, False) == ["a", " bc", "d", "", "é", "", "", "", "🤖", " a", "d", ""]


def test_stream_of_bytes_that_form_no_character_stays_quick(tokenizer, tmp_path):
    lone = next(i for i in range(4096) if tokenizer.decode([i]) == REPLACEMENT)
    began = time.perf_counter()
    pieces = streamed(tokenizer, [lone] * 3000, False)
    assert "".join(pieces) == REPLACEMENT * 3000
    assert time.perf_counter() - began < 10


def test_flush_starts_anew(tokenizer):
    stream = tokenizer.stream()
    first = "".join([*(stream.push(i) for i in tokenizer.encode("one")), stream.flush()])
    second = "".join([*(stream.push(i) for i in tokenizer.encode("two")), stream.flush()])
    assert (first, second) == ("one", "two")


def test_cut_windows():
    windows = cut_windows(range(11), 4)
    assert windows.dtype == np.int64 and windows.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut_windows(np.arange(8).reshape(2, 4), 8).shape == (1, 8)
    with pytest.raises(UsageError, match="at least 12"):
        cut_windows(range(11), 12)
