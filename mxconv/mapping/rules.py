"""Rules and tables: how a dialect or layout names and arranges the canonical parameters.

A rule says that the tensor `pattern` *holds* some parameters along `axes`. The axes string lists the stored axes from
slowest to fastest, a parenthesised group being one stored axis made of several named ones; `*` is where the held
parameters lie side by side:

    "I H"            one parameter, as it is                     "(N * D) H"   per head q | k | v (interleaved)
    "H (* N D)"      transposed; q, then k, then v               "E (* I) H"   every expert stacked, gate rows before up rows

The same rule reads and writes, so every table runs backwards too. A rule that holds nothing says why it is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from mxconv.config import FULL, LINEAR

Group = Literal["embedding", "attention", "lightning", "router", "experts", "shared", "norm", "decay"]

_NUMBER = re.compile(r"(?<=\.)(0|[1-9][0-9]{0,5})(?=\.|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One tensor name pattern; `{l}` stands for a layer number, `{e}` for an expert number."""

    pattern: str
    holds: tuple[str, ...] = ()
    """Roles of `mapping.parameters` in the order in which they lie along `*`."""
    axes: str = ""
    group: Group
    layers: str | None = None
    """The kind of layer (config.LINEAR or config.FULL) that has this tensor; None for both and for tensors of no layer."""
    shard: str | None = None
    """The axis that tensor parallelism cuts; None keeps the tensor whole on every rank."""
    pad_vocabulary: Literal["no", "always", "if undivided"] = "no"
    dtype: str | None = None
    """A dtype that the layout insists on; None keeps what is found."""
    read_only: bool = False
    """Accepted when reading, never written."""
    dropped: str | None = None
    """Why a tensor of this name holds no parameter."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A dialect or layout: its rules and the numbers of its files."""

    name: str
    rules: tuple[Rule, ...]
    first_file: int
    ranked: bool = False
    """Files are per tensor-parallel rank."""
    rope_permuted: bool = False
    """q and k of softmax layers are written in transformers' `proportional` order."""
    by_template: Mapping[str, Rule] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        templates = {re.sub(r"\{[le]\}", "{}", rule.pattern): rule for rule in self.rules}
        if len(templates) != len(self.rules):
            raise ValueError(f"table {self.name}: two rules share a pattern")
        object.__setattr__(self, "by_template", templates)

    def match(self, name: str) -> tuple[Rule, Mapping[str, int]] | None:
        """The rule of tensor `name` and its numbers, None when no rule has it. Patterns match whole names."""
        rule = self.by_template.get(_NUMBER.sub("{}", name))
        if rule is None:
            return None
        letters = re.findall(r"\{([le])\}", rule.pattern)
        return rule, dict(zip(letters, map(int, _NUMBER.findall(name)), strict=True))

    @cached_property
    def by_role(self) -> Mapping[tuple[str, str], Rule]:
        """(role, kind of layer) → the rule that writes it."""
        return {
            (role, kind): rule
            for rule in self.rules
            if not rule.read_only
            for role in rule.holds
            for kind in (LINEAR, FULL)
            if rule.layers in (None, kind)
        }


def fill(pattern: str, layer: int | None, expert: int | None) -> str:
    """`pattern` with its numbers."""
    return pattern.replace("{l}", str(layer)).replace("{e}", str(expert))
