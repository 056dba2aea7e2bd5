"""What a user meets: tokenizer, end of sequence, chat template, embedding rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mxconv.config import read_config
from mxconv.execute import convert
from mxconv.verify import Options, verify
from mxconv.verify.serving import look_at_text, zero_row_words
from tests.spoil import Folder
from tests.synthetic import make_checkpoint


@pytest.fixture
def folder(demo: Path, tmp_path: Path) -> Path:
    """The demo model's text files and config, to be spoiled."""
    for path in demo.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, tmp_path)
    return tmp_path


def edit(path: Path, **keys: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **keys}))


def test_the_demo_model(folder: Path, demo: Path) -> None:
    served = look_at_text(folder, demo, read_config(folder))
    assert not served.findings and not served.warnings
    assert served.lines == ["end of sequence 2 (tokenizer_config.json)", "no chat template"]


def test_a_tokenizer_larger_than_the_embedding(folder: Path) -> None:
    edit(folder / "config.json", vocab_size=1000)
    served = look_at_text(folder, None, read_config(folder))
    assert any("no row" in finding.what and finding.expected == "at most 1000 ids" for finding in served.findings)


def test_no_end_of_sequence_is_a_warning(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "eos_token"}))
    served = look_at_text(folder, None, read_config(folder))
    assert not served.findings and any("end-of-sequence" in text for text in served.warnings)
    edit(folder / "generation_config.json", eos_token_id=99999)
    served = look_at_text(folder, None, read_config(folder))
    assert any("outside the vocabulary" in finding.what for finding in served.findings)


@pytest.mark.parametrize(
    ("template", "kind"),
    [
        ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", "fine"),
        ("{% for m in messages %}{{ m.content | nofilter }}{% endfor %}", "finding"),
        ("{% for m in messages %}{{ unclosed", "finding"),
        ("{{ raise_exception('never') }}", "warning"),
        ("{{ messages[0].content }}", "warning"),
    ],
)
def test_chat_templates(folder: Path, template: str, kind: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    served = look_at_text(folder, None, read_config(folder))
    assert bool(served.findings) == (kind == "finding"), served.findings
    assert bool(served.warnings) == (kind == "warning"), served.warnings
    assert any("renders" in line for line in served.lines) == (kind == "fine" or "messages[0]" in template)


def test_a_broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    assert look_at_text(folder, None, read_config(folder)).findings


def test_text_files_are_the_sources(folder: Path, demo: Path) -> None:
    (folder / "merges.txt").write_text("a b\n")
    (folder / "vocab.json").unlink()
    served = look_at_text(folder, demo, read_config(folder))
    assert {(finding.file, finding.what) for finding in served.findings} == {
        ("merges.txt", "differs from the source's file"), ("vocab.json", "the source has this file and the artifact does not"),
    }  # fmt: skip


def test_zero_rows_are_listed_and_matter_when_used() -> None:
    warnings, findings = zero_row_words({"embed": [3, 9], "lm_head": list(range(20))}, used=[1, 2])
    assert warnings[0] == "embed: all-zero rows of tokens 3, 9" and "(20 in all)" in warnings[1] and not findings
    _, (finding,) = zero_row_words({"embed": [3, 9], "lm_head": [1]}, used=[1, 2, 9])
    assert "tokens [9]" in (finding.place or "")


def test_zero_rows_are_found_in_every_rank(tmp_path: Path, made: Callable[..., Path], small: Path) -> None:
    shutil.copytree(made(None, 2), tmp_path / "out")
    spoiled = Folder(tmp_path / "out", small)
    spoiled.ranks[0]["model.embed_tokens.weight"][5] = 0
    spoiled.ranks[1]["model.embed_tokens.weight"][7] = 0
    spoiled.save()
    report = verify(tmp_path / "out", Options(sections=("structure", "numerics")))
    assert "embed: all-zero rows of tokens 5, 71" in report.section("structure").warnings


def test_a_source_with_zero_rows_is_no_failure(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = make_checkpoint(tmp_path / "source", files=1)
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"][100:] = 0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, tmp_path / "out", tp=2)
    report = verify(tmp_path / "out", Options(source=source, windows=2, window=40))
    assert report.ok
    assert "(28 in all)" in "".join(report.section("structure").warnings)
