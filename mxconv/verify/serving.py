"""What a user meets when an artifact is served: can a generation end, does the chat template render, has every id a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mxconv.config import ModelConfig
from mxconv.errors import MalformedInput, MxconvError, UsageError
from mxconv.text import Tokenizer
from mxconv.verify.findings import Finding, from_error

CHECK = "tokenizer and chat template"

# Files of text in and out; they must be the source's own.
TEXT_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "generation_config.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
MAX_FILE_BYTES = 256 << 20
CONVERSATION = (
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Italy?"},
)
MAX_LISTED = 8


@dataclass(slots=True)
class Served:
    """`findings` would break a user's session; `warnings` are worth knowing and may be the source's own doing."""

    findings: list[Finding] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def look_at_text(artifact: Path, source: Path | None, config: ModelConfig) -> Served:
    """Tokenizer, end of sequence and chat template of the artifact, and whether its text files are the source's."""
    served = Served()
    if source is not None:
        served.findings += [finding for name in TEXT_FILES for finding in _same_file(artifact, source, name)]
    try:
        tokenizer = Tokenizer.open(artifact)
    except MxconvError as error:
        served.findings += from_error(error, CHECK)
        return served
    if tokenizer is None:
        served.lines.append("no tokenizer: text is not looked at")
        _end_of_sequence(served, config.eos_token_ids, "config.json", config)
        return served
    served.warnings += tokenizer.notes
    if tokenizer.vocab_size > config.vocab_size:
        served.findings.append(
            Finding(
                check=CHECK, what="the tokenizer has ids that the embedding has no row for", file="tokenizer.json",
                expected=f"at most {config.vocab_size} ids", got=f"{tokenizer.vocab_size}",
            )
        )
    _end_of_sequence(served, tokenizer.eos_ids, tokenizer.eos_from or "", config)
    _chat(served, tokenizer)
    return served


def _end_of_sequence(served: Served, ids: Sequence[int], where: str, config: ModelConfig) -> None:
    if not ids:
        served.warnings.append("no file names an end-of-sequence token: generation ends at its length only")
        return
    beyond = [i for i in ids if i >= config.vocab_size]
    if beyond:
        what = "the end-of-sequence token lies outside the vocabulary"
        expected = f"below {config.vocab_size}"
        served.findings.append(Finding(check=CHECK, what=what, file=where, expected=expected, got=str(beyond)))
    else:
        served.lines.append(f"end of sequence {', '.join(map(str, ids))} ({where})")


def _chat(served: Served, tokenizer: Tokenizer) -> None:
    if tokenizer.chat is None:
        served.lines.append("no chat template")
        return
    try:
        text = tokenizer.chat.render(CONVERSATION)
    except UsageError as error:
        served.warnings.append(f"the chat template refuses a plain conversation: {error.what}")
    except MalformedInput as error:
        served.findings += from_error(error, CHECK)
    else:
        missing = [message["content"] for message in CONVERSATION if message["content"] not in text]
        if missing:
            served.warnings.append(f"the chat template leaves out a message: {missing[0]!r}")
        served.lines.append(f"chat template renders: a short conversation is {len(tokenizer.encode(text, special=False))} tokens")


def _same_file(artifact: Path, source: Path, name: str) -> Sequence[Finding]:
    """A text file of the source that the artifact lacks or has otherwise."""
    theirs = source / name
    if not theirs.is_file() or theirs.stat().st_size > MAX_FILE_BYTES:
        return ()
    ours = artifact / name
    if not ours.is_file():
        return (Finding(check=CHECK, what="the source has this file and the artifact does not", file=name),)
    if ours.stat().st_size != theirs.stat().st_size or ours.read_bytes() != theirs.read_bytes():
        return (Finding(check=CHECK, what="differs from the source's file", file=name),)
    return ()


def zero_row_words(zero: Mapping[str, Sequence[int]], used: Sequence[int]) -> tuple[list[str], list[Finding]]:
    """(warnings, findings) for rows of embedding and head that are all zero: a token that prompts use must have one."""
    warnings, findings = [], []
    for name, ids in zero.items():
        if not ids:
            continue
        listed = ", ".join(map(str, ids[:MAX_LISTED])) + (f" … ({len(ids)} in all)" if len(ids) > MAX_LISTED else "")
        warnings.append(f"{name}: all-zero rows of tokens {listed}")
        hit = sorted(set(ids) & set(used)) if name == "embed" else []
        if hit:
            what = "a token that the text uses has an all-zero embedding"
            findings.append(Finding(check="embedding rows", what=what, place=f"tokens {hit[:MAX_LISTED]}"))
    return warnings, findings
