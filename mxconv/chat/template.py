"""ChatTemplate: where a checkpoint's template is found, and how messages go through it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mxconv.errors import MalformedInput, UsageError, printable
from mxconv.jsonfiles import read_json, read_regular

if TYPE_CHECKING:
    import jinja2

MAX_TEMPLATE_BYTES = 4 << 20


class ChatTemplate:
    """The chat template of one checkpoint; `ChatTemplate.open` finds it, `render` runs it."""

    def __init__(self, source: str, where: Path, special: Mapping[str, str]) -> None:
        self.source, self.where, self.special = source, where, dict(special)
        self._compiled: jinja2.Template | None = None

    @classmethod
    def open(cls, folder: Path, special: Mapping[str, str]) -> ChatTemplate | None:
        """The template in chat_template.jinja, else in tokenizer_config.json (alone or as the `default` of several), or None."""
        alone = folder / "chat_template.jinja"
        if alone.exists():
            try:
                return cls(read_regular(alone, MAX_TEMPLATE_BYTES).decode("utf-8"), alone, special)
            except UnicodeDecodeError as error:
                raise MalformedInput(f"chat template is not UTF-8: {error.reason}", where=alone) from None
        config = folder / "tokenizer_config.json"
        content = read_json(config) if config.exists() else {}
        stored = content.get("chat_template") if isinstance(content, dict) else None
        source = _default_template(stored)
        if stored is not None and source is None:
            raise MalformedInput("chat_template is wrong", where=config, expected="a text, or a list of name and template")
        return None if source is None else cls(source, config, special)

    def render(self, messages: Sequence[Mapping[str, Any]], *, generation_prompt: bool = True, **variables: Any) -> str:
        """The text of `messages` ({"role", "content"} each), ending where the model should go on if `generation_prompt`.

        `variables` are passed on (`tools`, `documents` …). Raises UsageError when the template refuses the messages,
        MalformedInput when it is broken.
        """
        from mxconv.chat.sandbox import MAX_RENDERED, Refused, environment  # jinja2, only when a template runs

        context = self.special | {"tools": None, "documents": None} | variables
        pieces, length = [], 0
        try:
            if self._compiled is None:
                self._compiled = environment().from_string(self.source)
            for piece in self._compiled.generate(messages=list(messages), add_generation_prompt=generation_prompt, **context):
                length += len(piece)
                if length > MAX_RENDERED:
                    raise MalformedInput("chat template writes without end", where=self.where, expected=f"at most {MAX_RENDERED}")
                pieces.append(piece)
        except Refused as refusal:
            raise UsageError(f"the chat template refuses these messages: {printable(refusal)}", where=self.where) from None
        except (MalformedInput, KeyboardInterrupt):
            raise
        except Exception as error:  # whatever the program in the template does wrong
            text = printable(f"{type(error).__name__}: {error}")
            raise MalformedInput(f"chat template cannot be rendered: {text}", where=self.where) from None
        return "".join(pieces)


def _default_template(stored: object) -> str | None:
    if isinstance(stored, str):
        return stored
    if not isinstance(stored, list):
        return None
    named = {
        entry["name"]: entry["template"]
        for entry in stored
        if isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
    }
    return named.get("default")
