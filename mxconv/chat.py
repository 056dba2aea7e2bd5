"""Chat templates: messages to the text that a model was trained on.

A template is a program that comes with a checkpoint, so it runs in jinja2's immutable sandbox, with the environment
that transformers gives it (`trim_blocks`, `lstrip_blocks`, loop controls, `{% generation %}`, a `tojson` that does not
escape HTML, `raise_exception`, `strftime_now`), and with a bound on what it may write and multiply.
Source: transformers, utils/chat_template_utils.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mxconv.config import read_json, read_regular
from mxconv.errors import MalformedInput, UsageError, printable

if TYPE_CHECKING:
    import jinja2

MAX_TEMPLATE_BYTES = 4 << 20
MAX_RENDERED = 16 << 20
"""Characters that a template may write, and elements that one multiplication may make."""


class Refused(Exception):
    """The template called raise_exception: it does not take these messages."""


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
        context = self.special | {"tools": None, "documents": None} | variables
        pieces, length = [], 0
        try:
            if self._compiled is None:
                self._compiled = _environment().from_string(self.source)
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


def _environment() -> jinja2.Environment:
    import jinja2.ext
    import jinja2.nodes
    import jinja2.parser
    import jinja2.utils
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        """Multiplication and powers are bounded: 'a' * 10**10 would take the machine's memory."""

        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**" and not (_is_number(left) and _is_number(right) and abs(left) < 1 << 64 and abs(right) <= 64):
                raise SecurityError("power is too large")
            if operator == "*":
                for items, times in ((left, right), (right, left)):
                    if isinstance(items, Sequence) and isinstance(times, int) and len(items) * times > MAX_RENDERED:
                        raise SecurityError("repetition is too large")
                if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > 1 << 12:
                    raise SecurityError("product is too large")
            return super().call_binop(context, operator, left, right)

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the assistant's part; for rendering it is its body."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Namespace(jinja2.utils.Namespace):
        """No attribute that begins with an underscore, which would reach into the interpreter."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, *rest = args
            jinja2.utils.Namespace.__init__(self, {})
            for name, value in dict(*rest, **kwargs).items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise SecurityError(f"namespace attribute {name!r} is not allowed")
            jinja2.utils.Namespace.__setitem__(self, name, value)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _refuse, "strftime_now": _strftime_now, "dict": lambda *a, **k: dict(*a, **k), "namespace": Namespace,
    }  # fmt: skip
    return environment


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    allowed = {key: options[key] for key in ("indent", "separators", "sort_keys") if key in options}
    return json.dumps(value, ensure_ascii=ensure_ascii, **allowed)


def _refuse(message: object) -> None:
    raise Refused(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)
