"""The Plan and its parts: frozen values that say everything about a run before a weight is read (no torch).

A plan is files × units. A *unit* is the grain of threads, resume and progress: outputs that share sources, idempotent and
free of order. What a unit does is one word of a closed vocabulary (`Op`); the executor has one function for each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mxconv.config import ModelConfig
from mxconv.mapping.containers import Container, Part
from mxconv.placement import PlacedFile
from mxconv.quantize.schemes import Scheme
from mxconv.tensors import Box, TensorSpec, box_shape

PLAN_VERSION = 1
Op = Literal["check_decay", "check_tied", "copy", "quantize", "decay"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A box of a target container that one unit writes: `parts` of it, each cut to `locals_` (relative to its part).

    `box` is the stored box; for parts that follow each other along a stored axis there is one piece a part.
    """

    container: Container
    parts: tuple[Part, ...]
    locals_: tuple[Box, ...]
    box: Box


@dataclass(frozen=True, slots=True, kw_only=True)
class Coded:
    """The tensors of one quantized projection on one rank."""

    rank: int
    codes: TensorSpec
    scale: TensorSpec
    activation: TensorSpec | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One output tensor, or the box of one, on one rank."""

    rank: int
    spec: TensorSpec
    box: Box

    @property
    def size_bytes(self) -> int:
        """Bytes of the box."""
        return TensorSpec(name="", dtype=self.spec.dtype, shape=box_shape(self.box)).size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One idempotent piece of work. `reads` are (rank, tensor) of the source; sizes are in bytes."""

    id: str
    op: Op
    group: str
    layer: int | None
    reads: tuple[tuple[int, str], ...]
    outputs: tuple[Output, ...]
    read_bytes: int
    memory_bytes: int
    pieces: tuple[Piece, ...] = ()
    projection: str | None = None
    expert: int | None = None
    sources: tuple[str, ...] = ()
    """Canonical parameters of a quantized projection: gate and up, or down."""
    coded: tuple[Coded, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for; everything here can change output bytes. `layout` None means the source's own form."""

    layout: str | None = "fastdeploy"
    tp: int = 1
    scheme: Scheme | None = None
    ignore: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    keep_decay: bool = False
    calibration: str | None = None
    """Digest of the token ids that a static scheme is calibrated on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSize:
    """One line of `inspect`: the tensors of a group before and after."""

    group: str
    tensors: int
    parameters: int
    dtypes: tuple[str, ...]
    source_bytes: int
    target_bytes: int
    becomes: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Source headers + request, worked out: files with every tensor placed, units, notes and the two digests."""

    request: Request
    layout: str
    source_digest: str
    source_summary: Mapping[str, Any]
    config: Mapping[str, Any]
    """The artifact's config.json."""
    config_text: str | None
    """Its text, where a checkpoint is rebuilt and the text is the original's."""
    target: ModelConfig
    files: tuple[PlacedFile, ...]
    rank_files: tuple[tuple[int, ...], ...]
    """For each rank the indexes into `files`."""
    file_of: Mapping[tuple[int, str], int]
    units: tuple[Unit, ...]
    groups: tuple[GroupSize, ...]
    notes: tuple[str, ...]
    dropped: Mapping[str, str]
    ignored_layers: tuple[int, ...]
    numerics: Mapping[str, Any] = field(repr=False)
    numerics_digest: str
    placement_digest: str
    index_metadata: Mapping[str, Any]
    """`metadata` of the index files, beside total_size."""
    with_index: bool
    digest: str

    @property
    def output_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(file.size_bytes for file in self.files)

    @property
    def read_bytes(self) -> int:
        """Source bytes that the units read."""
        return sum(unit.read_bytes for unit in self.units)

    @property
    def largest_unit_bytes(self) -> int:
        """The memory that one worker needs at most."""
        return max((unit.memory_bytes for unit in self.units), default=0)

    def document(self) -> dict[str, Any]:
        """The whole plan as JSON values, in a fixed order; `digest` is the SHA-256 of its canonical text."""
        placement = placement_document(self.layout, len(self.rank_files), self.files)
        return plan_document(numerics=self.numerics, placement=placement, units=self.units, config=self.config)


def canonical_json(value: Any) -> bytes:
    """`value` as canonical JSON: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def unit_document(unit: Unit) -> dict[str, Any]:
    """One unit as JSON values: what it reads, does and writes."""
    steps = [
        {
            "into": f"rank{piece.container.rank}:{piece.container.name}",
            "axes": [" ".join(group) for group in piece.container.dims],
            "parts": [[part.parameter, part.slot, list(map(list, part.box))] for part in piece.parts],
            "box": list(map(list, piece.box)),
        }
        for piece in unit.pieces
    ]
    return {
        "id": unit.id,
        "op": unit.op,
        "reads": [f"rank{rank}:{name}" for rank, name in unit.reads],
        "steps": steps or ([unit.projection, *unit.sources] if unit.projection else []),
        "writes": [[o.rank, o.spec.name, o.spec.dtype, list(map(list, o.box))] for o in unit.outputs],
    }


def plan_document(
    *, numerics: Mapping[str, Any], placement: Mapping[str, Any], units: Sequence[Unit], config: Mapping[str, Any]
) -> dict[str, Any]:
    """The canonical JSON document of a plan (`Plan.document`)."""
    return {
        "version": PLAN_VERSION,
        "numerics": dict(numerics),
        "placement": dict(placement),
        "config": dict(config),
        "units": [unit_document(unit) for unit in units],
    }


def placement_document(layout: str, tp: int, files: Sequence[PlacedFile]) -> dict[str, Any]:
    """Ranks and files: which tensor at which offset."""
    return {
        "layout": layout,
        "tp": tp,
        "files": [
            {
                "path": f.path,
                "size": f.size_bytes,
                "tensors": [[t.name, t.dtype, list(t.shape), f.offsets[t.name]] for t in f.tensors],
            }
            for f in files
        ],
    }
