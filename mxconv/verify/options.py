"""What verify is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from mxconv.errors import MxconvError, UsageError, raise_all
from mxconv.verify.findings import SECTIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The request. Without a `source`, what needs one is skipped and the report says so."""

    source: Path | None = None
    """The checkpoint that the artifact was made from."""
    tp: int | None = None
    """The number of ranks that the artifact must have; for a layout without ranks, how many to simulate."""
    device: str = "cpu"
    windows: int = 16
    window: int = 512
    text: Path | None = None
    tokens: Path | None = None
    """Token ids as .npy, [N, T] or 1-D; instead of a text."""
    reference: Path | None = None
    """A file that keeps the source's side of the logits: read when it is there, otherwise written."""
    limits: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    keep_decay: bool = False
    memory_bytes: int = 1 << 30
    """An eighth of it is for blocks of logits; hidden states and one expert of each side are as large as the model makes them."""
    seed: int = 0
    hash_files: bool = False
    """Hash every file against the manifest too, which `mxconv check` does alone."""
    sections: tuple[str, ...] = SECTIONS
    """What to look at; structure always is. `parallel` compares logits only when `logits` is asked for too."""

    def __post_init__(self) -> None:
        problems: list[MxconvError] = []
        for name in ("source", "text", "tokens", "reference"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else Path(value))
        for name in self.sections:
            if name not in SECTIONS:
                problems.append(UsageError(f"verify has no section {name!r}", expected=" or ".join(SECTIONS)))
        if self.windows < 1:
            problems.append(UsageError("at least one window is needed", got=self.windows))
        if self.window < 2:
            problems.append(UsageError("a window needs at least two tokens", got=self.window))
        if self.text is not None and self.tokens is not None:
            problems.append(UsageError("a text and token ids are given; one of them is enough"))
        if self.reference is not None and self.source is None:
            problems.append(UsageError("a reference is the source's, so that the source must be given", hint="add --source"))
        raise_all(problems)
