"""Properties that every table must have: whole-name patterns, one rule a tensor, no rule without a user."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxconv.config import FULL, LINEAR, read_config
from mxconv.mapping.bind import bind, expected_specs
from mxconv.mapping.parameters import ROLES, parameters
from mxconv.mapping.rules import Rule, Table, fill
from mxconv.mapping.tables import TABLES

ALL_RULES = [(table, rule) for table in TABLES.values() for rule in table.rules]
IDS = [f"{table.name}:{rule.pattern}" for table, rule in ALL_RULES]


@pytest.mark.parametrize(("table", "rule"), ALL_RULES, ids=IDS)
def test_a_pattern_matches_its_own_name_and_gives_its_numbers_back(table: Table, rule: Rule) -> None:
    name = fill(rule.pattern, 17, 205)
    found = table.match(name)
    assert found is not None and found[0] is rule
    assert fill(rule.pattern, found[1].get("l"), found[1].get("e")) == name


@pytest.mark.parametrize(("table", "rule"), ALL_RULES, ids=IDS)
@pytest.mark.parametrize("change", ["_scale_inv", ".weight", "s", "_scale", ".0"])
def test_a_pattern_ends_at_a_name_boundary(table: Table, rule: Rule, change: str) -> None:
    name = fill(rule.pattern, 3, 4)
    assert table.match(name + change) is None
    assert table.match("x" + name) is None
    assert table.match("model." + name) is None


@pytest.mark.parametrize(("table", "rule"), ALL_RULES, ids=IDS)
def test_numbers_are_canonical(table: Table, rule: Rule) -> None:
    """`layers.03` and `layers.-1` are other names: two spellings of one layer must not both be taken."""
    for bad in ("03", "-1", "1e2", "１", "9999999", ""):
        for letter in ("{l}", "{e}"):
            if letter in rule.pattern:
                assert table.match(fill(rule.pattern.replace(letter, bad), 1, 1)) is None


@given(st.text(alphabet="model.layers0123456789_{}weightqkvprojexdn", max_size=80))
def test_random_names_match_only_as_whole_patterns(name: str) -> None:
    for table in TABLES.values():
        found = table.match(name)
        if found is not None:
            rule, numbers = found
            assert fill(rule.pattern, numbers.get("l"), numbers.get("e")) == name


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_role_is_written_by_exactly_one_rule_for_each_kind_of_layer(table: Table) -> None:
    writers: dict[tuple[str, str], list[str]] = {}
    for rule in table.rules:
        for role in rule.holds:
            for kind in (LINEAR, FULL):
                if not rule.read_only and rule.layers in (None, kind):
                    writers.setdefault((role, kind), []).append(rule.pattern)
    assert all(len(patterns) == 1 for patterns in writers.values()), writers
    roles = {role for role, _ in writers}
    assert roles <= set(ROLES)


@pytest.mark.parametrize(("table", "rule"), ALL_RULES, ids=IDS)
def test_the_axes_of_a_rule_are_those_of_what_it_holds(table: Table, rule: Rule) -> None:
    named = sorted(token for token in re.findall(r"[A-Z1]", rule.axes))
    for role in rule.holds:
        stacked = ["E"] if "{e}" in role and "{e}" not in rule.pattern else []
        assert named == sorted([*ROLES[role], *stacked]), rule
    assert bool(rule.holds) != bool(rule.dropped)
    assert ("*" in rule.axes) == (len(rule.holds) > 1)
    if rule.shard:
        assert rule.shard in rule.axes


def test_the_real_index_is_covered_by_17_patterns(shared: Path) -> None:
    reference = shared / "reference" / "minimax-m1"
    weight_map = json.loads((reference / "model.safetensors.index.json").read_text())["weight_map"]
    config, table = read_config(reference), TABLES["minimax-m1"]
    assert len(weight_map) == 8243
    specs = expected_specs(table, config, weight_map, {"router": "F32"})
    assert sum(spec.size_bytes for spec in specs.values()) == 912_210_767_872
    bound = bind(table, config, list(parameters(config, dense_mlp=False)), [specs])
    assert not bound.problems
    assert len({rule.pattern for rule in bound.rules.values()}) == 17
    assert len(bound.holders) == sum(1 for _ in parameters(config, dense_mlp=False))
    assert all(len(holders) == 1 for holders in bound.holders.values())


# Rules that the released M1 does not use, and what does use them.
USED_ELSEWHERE = {
    "shared_mlp": "the original modeling code with shared_intermediate_size > 0",
    "coefficient": "the original modeling code with shared_intermediate_size > 0",
    "mlp.gate_proj": "the original modeling code with one expert",
    "mlp.up_proj": "the original modeling code with one expert",
    "mlp.down_proj": "the original modeling code with one expert",
}


def test_every_rule_of_the_released_dialect_has_a_user(shared: Path) -> None:
    reference = shared / "reference" / "minimax-m1"
    weight_map = json.loads((reference / "model.safetensors.index.json").read_text())["weight_map"]
    table = TABLES["minimax-m1"]
    used = {found[0].pattern for name in weight_map if (found := table.match(name)) is not None}
    for rule in table.rules:
        assert rule.pattern in used or any(word in rule.pattern for word in USED_ELSEWHERE), rule.pattern
