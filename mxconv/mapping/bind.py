"""Binding: a table and a config become the containers of one checkpoint, on paper or against its headers.

`lay_out` says what a layout stores for a set of parameters at R ranks; `bind` matches the tensors that files hold to
the same description. Both give containers, so that source and target of a conversion are the same kind of value.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from mxconv.config import FULL, LINEAR, ModelConfig
from mxconv.errors import IncompleteInput, Listed, MalformedInput, MxconvError, UsageError
from mxconv.mapping.containers import SIDE_BY_SIDE, STACK, Container, Dims, Part, parse_axes
from mxconv.mapping.fastdeploy import VOCABULARY_MULTIPLE
from mxconv.mapping.parameters import ROLES, Parameter, parameter
from mxconv.mapping.rules import Rule, Table, fill
from mxconv.tensors import FLOAT_DTYPES, TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """The containers of a checkpoint, where each parameter lies in them, what was dropped, and everything wrong."""

    containers: tuple[Container, ...]
    holders: Mapping[str, tuple[tuple[Container, Part], ...]]
    rules: Mapping[str, Rule]
    """Tensor name → its rule (the same on every rank)."""
    dropped: Mapping[str, str]
    """Tensor name → why nothing is kept of it."""
    problems: tuple[MxconvError, ...]


def padded_vocabulary(rule: Rule, vocabulary: int, ranks: int) -> int:
    """Rows of the vocabulary after padding by `rule`."""
    if rule.pad_vocabulary == "always" or (rule.pad_vocabulary == "if undivided" and vocabulary % ranks):
        return -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    return vocabulary


def shard_range(rule: Rule, param: Parameter, rank: int, ranks: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(origin, extent) of `param` on `rank` along its axes, padding included; None when its size does not divide.

    Key/value heads are replicated when there are more ranks than heads: rank r of R holds head r·heads // R.
    """
    origin: list[int] = []
    extent: list[int] = []
    for axis, size in zip(param.axes, param.shape, strict=True):
        room = padded_vocabulary(rule, size, ranks) if axis == "V" else size
        if axis != rule.shard:
            origin.append(0)
            extent.append(size)
        elif _replicates(param, axis, ranks) and ranks % size == 0:
            origin.append(rank * size // ranks)
            extent.append(1)
        elif room % ranks == 0:
            origin.append(rank * (room // ranks))
            extent.append(room // ranks)
        else:
            return None
    return tuple(origin), tuple(extent)


def _replicates(param: Parameter, axis: str, ranks: int) -> bool:
    """Key/value heads fewer than ranks are copied, not cut."""
    kv = param.full_attention and param.role in ("layers.{l}.k", "layers.{l}.v")
    return kv and axis == "N" and ranks > param.shape[0]


def _part(param: Parameter, origin: tuple[int, ...], extent: tuple[int, ...], slot: int, stack: int | None) -> Part:
    ends = zip(origin, extent, param.shape, strict=True)
    box = tuple((min(start, size), min(start + n, size)) for start, n, size in ends)
    return Part(parameter=param.name, axes=param.axes, origin=origin, extent=extent, box=box, slot=slot, stack=stack)


def _stored_shape(dims: Dims, parts: Sequence[Part], stacked: int) -> tuple[int, ...]:
    """Sizes of the stored axes that hold `parts`, of which the first `stacked` slots repeat along E."""
    shape = []
    slots = [part for part in parts if part.stack in (None, 0)]
    for group in dims:
        if group == (STACK,) and STACK not in parts[0].axes:
            shape.append(stacked)
            continue
        named = [axis for axis in group if axis != SIDE_BY_SIDE]
        each = [math.prod(n for axis, n in zip(part.axes, part.extent, strict=True) if axis in named) for part in slots]
        shape.append(sum(each) if SIDE_BY_SIDE in group else each[0])
    return tuple(shape)


def container_of(
    rule: Rule, config: ModelConfig, layer: int | None, expert: int | None, rank: int, ranks: int, dtype: str
) -> Container | None:
    """The container of `rule` at these numbers on `rank`; None when a size does not divide."""
    dims = parse_axes(rule.axes)
    experts: Iterable[int | None] = [expert]
    stacked = (STACK,) in dims and STACK not in ROLES[rule.holds[0]]
    if stacked:
        experts = range(config.num_experts)
    parts = []
    for number in experts:
        for slot, role in enumerate(rule.holds):
            param = parameter(config, role, layer, number)
            cut = shard_range(rule, param, rank, ranks)
            if cut is None:
                return None
            parts.append(_part(param, *cut, slot, number if stacked else None))
    shape = _stored_shape(dims, parts, config.num_experts)
    return Container(rank=rank, name=fill(rule.pattern, layer, expert), dtype=dtype, dims=dims, shape=shape, parts=tuple(parts))


def divisible(table: Table, config: ModelConfig, params: Iterable[Parameter], ranks: int) -> list[str]:
    """Sizes that `table` cannot cut into `ranks`, in words; empty when all divide."""
    failing: dict[str, None] = {}
    labels = {"V": "the padded vocabulary", "N": "attention heads", "I": "intermediate_size", "S": "shared_intermediate_size"}
    seen = set()
    for param in params:
        key = (param.role, param.shape)
        if key in seen:
            continue
        seen.add(key)
        kind = FULL if param.full_attention else LINEAR
        rule = table.by_role[param.role, kind]
        if rule.shard and shard_range(rule, param, 0, ranks) is None:
            size = param.shape[param.axes.index(rule.shard)]
            is_kv = param.full_attention and param.role in ("layers.{l}.k", "layers.{l}.v")
            label = "key/value heads" if is_kv else labels[rule.shard]
            failing[f"{label} {size}"] = None
    return list(failing)


def lay_out(
    table: Table, config: ModelConfig, params: Sequence[Parameter], ranks: int, dtypes: Mapping[str, str]
) -> tuple[Container, ...]:
    """The containers in which `table` stores `params` at `ranks` ranks, rank by rank.

    `dtypes` gives the dtype of each parameter; the parts of a container must agree in it. Raises UsageError when a size
    does not divide, MalformedInput when dtypes of fused parameters differ.
    """
    made: dict[tuple[int, str], Container] = {}
    for rank in range(ranks):
        for param in params:
            kind = FULL if param.full_attention else LINEAR
            rule = table.by_role.get((param.role, kind))
            if rule is None:
                raise UsageError(f"layout {table.name} has no place for {param.name}")
            name = fill(rule.pattern, param.layer, param.expert)
            if (rank, name) in made:
                continue
            found = {dtypes[fill(role, param.layer, param.expert)] for role in rule.holds}
            if len(found) != 1 and rule.dtype is None:
                raise MalformedInput(f"tensors fused into {name} have different dtypes", expected="one dtype", got=sorted(found))
            container = container_of(rule, config, param.layer, param.expert, rank, ranks, rule.dtype or found.pop())
            if container is None:
                raise UsageError(f"{name} cannot be cut into {ranks} ranks")
            made[rank, name] = container
    return tuple(made.values())


def _mismatch(rank: int, ranks: int, name: str) -> str:
    return f"rank{rank}: {name}" if ranks > 1 else name


def bind(
    table: Table,
    config: ModelConfig,
    params: Sequence[Parameter],
    ranks: Sequence[Mapping[str, TensorSpec]],
    unread: Sequence[Collection[str]] = (),
) -> Bound:
    """Match the tensors that each rank's headers hold to `table` and `params`.

    Every tensor matches exactly one rule or is unexpected (IncompleteInput: this is another model); every parameter is held
    by one tensor a rank, in the shape that the config says (MalformedInput otherwise). Problems are collected, all of them.
    `unread`: names that an index puts into files which could not be read: those files are the problem, not their tensors.
    """
    wanted = {param.name for param in params}
    containers: list[Container] = []
    rules: dict[str, Rule] = {}
    dropped: dict[str, str] = {}
    problems = Listed()
    holders: dict[str, list[tuple[Container, Part]]] = {name: [] for name in wanted}
    for rank, tensors in enumerate(ranks):
        held: set[str] = set()
        for name, spec in tensors.items():
            where = _mismatch(rank, len(ranks), name)
            found = table.match(name)
            if found is None:
                _unexpected(problems, where)
                continue
            rule, numbers = found
            layer, expert = numbers.get("l"), numbers.get("e")
            beyond = layer is not None and layer >= config.num_layers
            if beyond or (rule.layers and config.layer_types[layer or 0] != rule.layers):
                _unexpected(problems, where)
                continue
            if rule.dropped:
                dropped[name] = rule.dropped
                continue
            container = None
            if expert is None or expert < config.num_experts:
                container = container_of(rule, config, layer, expert, rank, len(ranks), spec.dtype)
            if container is None or not {part.parameter for part in container.parts} <= wanted:
                _unexpected(problems, where)
                continue
            _check_spec(problems, container, spec, where)
            rules[name] = rule
            containers.append(container)
            for part in container.parts:
                if part.parameter in held:
                    problems.add(MalformedInput, "two tensors hold the same weights", where=where, got=part.parameter)
                held.add(part.parameter)
                holders[part.parameter].append((container, part))
        held |= _held_by(table, config, unread[rank] if unread else ())
        _check_missing(problems, table, config, [param for param in params if param.name not in held], rank, len(ranks))
    return Bound(
        containers=tuple(containers),
        holders={name: tuple(found) for name, found in holders.items()},
        rules=rules,
        dropped=dropped,
        problems=problems.problems(),
    )


def _held_by(table: Table, config: ModelConfig, names: Iterable[str]) -> set[str]:
    """The parameters that tensors of these names would hold."""
    held: set[str] = set()
    for name in names:
        found = table.match(name)
        if found is not None:
            experts = [found[1].get("e")] if "e" in found[1] else range(config.num_experts)
            held |= {fill(role, found[1].get("l"), expert) for role in found[0].holds for expert in experts}
    return held


def _unexpected(problems: Listed, where: str) -> None:
    hint = "--drop PATTERN leaves a tensor out on purpose, and the manifest says so"
    problems.add(IncompleteInput, "tensor is not one of this model's", where=where, hint=hint)


def _check_spec(problems: Listed, container: Container, spec: TensorSpec, where: str) -> None:
    expected, got = list(container.shape), list(spec.shape)
    if _only_experts_differ(container, spec.shape):
        what = "tensor is for another number of experts than the config says"
        problems.add(IncompleteInput, what, where=where, expected=expected, got=got)
    elif spec.shape != container.shape:
        problems.add(MalformedInput, "tensor has another shape than the config says", where=where, expected=expected, got=got)
    if spec.dtype not in FLOAT_DTYPES:
        what = "weight has a dtype that is no weight's"
        problems.add(MalformedInput, what, where=where, expected="BF16, F16, F32 or F64", got=spec.dtype)


def _only_experts_differ(container: Container, shape: tuple[int, ...]) -> bool:
    """A router or a stack of experts that is right but for how many there are: the checkpoint is not this config's, not broken."""
    if len(shape) != len(container.shape) or shape == container.shape:
        return False
    sizes = zip(shape, container.shape, container.dims, strict=True)
    return all(dims == (STACK,) for stored, wanted, dims in sizes if stored != wanted)


def _check_missing(
    problems: Listed, table: Table, config: ModelConfig, params: Sequence[Parameter], rank: int, ranks: int
) -> None:
    """One problem for each missing tensor, but experts of a layer counted together."""
    names: dict[str, Parameter] = {}
    for param in params:
        rule = table.by_role[param.role, FULL if param.full_attention else LINEAR]
        names.setdefault(fill(rule.pattern, param.layer, param.expert), param)
    experts: dict[int, dict[int, str]] = {}
    for name, param in names.items():
        if param.expert is not None and param.layer is not None:
            experts.setdefault(param.layer, {}).setdefault(param.expert, name)
        else:
            problems.add(IncompleteInput, "tensor is missing", where=_mismatch(rank, ranks, name))
    for layer, lost in experts.items():
        problems.add(
            IncompleteInput, f"layer {{}}: have {config.num_experts - len(lost)} of {config.num_experts} experts whole", layer,
            where=_mismatch(rank, ranks, lost[min(lost)]), expected="every expert of the config",
            got=f"missing or incomplete: {_few(lost)}",
        )  # fmt: skip


def _few(numbers: Iterable[int], limit: int = 8) -> str:
    ordered = sorted(numbers)
    return ", ".join(map(str, ordered[:limit])) + (f" and {len(ordered) - limit} more" if len(ordered) > limit else "")


def expected_specs(table: Table, config: ModelConfig, names: Iterable[str], sizes: Mapping[str, str]) -> dict[str, TensorSpec]:
    """Specs for tensors of which only names are known (an index without shards): shapes from the config, dtypes from `sizes`."""
    specs = {}
    for name in names:
        found = table.match(name)
        if found is None or not found[0].holds:
            continue
        rule, numbers = found
        if numbers.get("l", 0) >= config.num_layers:
            continue
        container = container_of(rule, config, numbers.get("l"), numbers.get("e"), 0, 1, sizes.get(rule.group, "BF16"))
        if container is not None:
            specs[name] = container.spec
    return specs


__all__ = ["Bound", "bind", "divisible", "expected_specs", "lay_out", "padded_vocabulary", "shard_range"]
