"""The environment that a chat template runs in.

A template is a program that comes with a checkpoint, so it runs in jinja2's immutable sandbox, with what transformers
gives it (`trim_blocks`, `lstrip_blocks`, loop controls, `{% generation %}`, a `tojson` that does not escape HTML,
`raise_exception`, `strftime_now`), and with bounds on what it may write and multiply.
Source: transformers, utils/chat_template_utils.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_RENDERED = 16 << 20
"""Characters that a template may write, and elements that one multiplication may make."""
MAX_PRODUCT_BITS = 1 << 12
MAX_EXPONENT = 64


class Refused(Exception):
    """The template called raise_exception: it does not take these messages."""


class Sandbox(ImmutableSandboxedEnvironment):
    """Products, repetitions and powers are bounded: 'a' * 10**10 would take the machine's memory."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`left operator right` when its result is of a sensible size, else SecurityError."""
        if operator == "**" and not (_is_number(left) and _is_number(right) and abs(left) < 1 << 64 and abs(right) <= MAX_EXPONENT):
            raise SecurityError("power is too large")
        if operator == "*":
            _check_product(left, right)
        return super().call_binop(context, operator, left, right)


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's part; for rendering it is its body."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The body of the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Namespace(jinja2.utils.Namespace):
    """No attribute that begins with an underscore, which would reach into the interpreter."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args  # so that namespace(self=…) is an attribute, as in jinja2
        jinja2.utils.Namespace.__init__(self, {})
        for name, value in dict(*rest, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"namespace attribute {name!r} is not allowed")
        jinja2.utils.Namespace.__setitem__(self, name, value)


def environment() -> jinja2.Environment:
    """A fresh sandbox with the filters and functions that chat templates expect."""
    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    sandbox.filters["tojson"] = _tojson
    sandbox.globals |= {
        "raise_exception": _refuse, "strftime_now": _strftime_now, "dict": lambda *a, **k: dict(*a, **k), "namespace": Namespace,
    }  # fmt: skip
    return sandbox


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > MAX_PRODUCT_BITS:
        raise SecurityError("product is too large")
    for items, times in ((left, right), (right, left)):
        if isinstance(items, Sequence) and isinstance(times, int) and len(items) * times > MAX_RENDERED:
            raise SecurityError("repetition is too large")


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    allowed = {key: options[key] for key in ("indent", "separators", "sort_keys") if key in options}
    return json.dumps(value, ensure_ascii=ensure_ascii, **allowed)


def _refuse(message: object) -> None:
    raise Refused(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)
