"""What the package brings along is whole and serves its purpose."""

from __future__ import annotations

import hashlib
import json

from mxconv.config import read_config
from mxconv.data import calibration_text, demo_model, evaluation_text
from mxconv.text import Tokenizer


def test_demo_model_is_whole():
    folder = demo_model()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for name in set(index["weight_map"].values()):
        size = int.from_bytes((folder / name).read_bytes()[:8], "little")
        header = json.loads((folder / name).read_bytes()[8 : 8 + size])
        header.pop("__metadata__", None)
        assert set(header) == {key for key, file in index["weight_map"].items() if file == name}
        end = max(entry["data_offsets"][1] for entry in header.values())
        assert (folder / name).stat().st_size == 8 + size + end
    config = read_config(folder)
    assert (config.num_layers, config.num_experts, config.vocab_size) == (4, 4, 4096)


def test_demo_model_is_the_shared_one(shared):
    for path in sorted((shared / "models" / "demo").iterdir()):
        twin = demo_model() / path.name
        assert hashlib.sha256(twin.read_bytes()).digest() == hashlib.sha256(path.read_bytes()).digest(), path.name


def test_texts_fill_the_windows_that_are_needed():
    tokenizer = Tokenizer.open(demo_model())
    assert tokenizer is not None
    for text, windows in ((calibration_text(), 16), (evaluation_text(), 16)):
        ids = tokenizer.encode(text)
        assert len(ids) >= windows * 512
        assert tokenizer.decode(ids) == text
        assert not any("\ufffd" in line for line in text.splitlines())


def test_texts_share_no_run_with_each_other_or_the_training_text(shared):
    """A perplexity on text that was seen in training, or calibrated on, would flatter."""
    tokenizer = Tokenizer.open(demo_model())
    assert tokenizer is not None
    run = 24
    evaluation = tokenizer.encode(evaluation_text())
    windows = {tuple(evaluation[i : i + run]) for i in range(len(evaluation) - run)}
    seen = [calibration_text(), *((shared / "models" / name).read_text("utf-8") for name in ("calibration.txt", "heldout.txt"))]
    for text in seen:
        ids = tokenizer.encode(text)
        assert not any(tuple(ids[i : i + run]) in windows for i in range(len(ids) - run))


def test_calibration_text_is_varied():
    text = calibration_text()
    scripts = {"latin": "the", "cyrillic": "снег", "han": "茶", "kana": "駅", "arabic": "السوق", "code": "def ", "sql": "SELECT"}
    assert [name for name, sample in scripts.items() if sample not in text] == []
