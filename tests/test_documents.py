"""The JSON envelope and errors as data."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from mxconv.documents import dumps, error_payload, plain, stamped
from mxconv.errors import MalformedInput, Problems, UsageError


def test_plain_makes_json_types():
    value = {1: (Path("a") / "b", {"y", "x"}), "n": np.float32(0.5), "i": np.int64(3), "bad": math.inf, "none": None}
    assert plain(MappingProxyType(value)) == {"1": ["a/b", ["x", "y"]], "n": 0.5, "i": 3, "bad": None, "none": None}


@pytest.mark.parametrize("value", [object(), b"bytes", np.zeros(2)])
def test_plain_refuses_what_has_no_json_form(value):
    with pytest.raises(TypeError):
        plain(value)


def test_envelope_comes_first():
    text = dumps(stamped("inspect", {"tensors": 3, "nan": math.nan}))
    assert text == '{"schema":"mxconv.inspect","version":1,"tensors":3,"nan":null}'


def test_error_lists_every_problem_and_the_deciding_code():
    error = Problems([UsageError("no such scheme", hint="see --help"), MalformedInput("bad header", where="a.safetensors", got=3)])
    payload = json.loads(dumps(error_payload(error)))
    assert payload["kind"] == "problems" and payload["exit_code"] == 3
    assert [p["exit_code"] for p in payload["problems"]] == [2, 3]
    assert payload["problems"][1] == {
        "kind": "malformed input", "exit_code": 3, "what": "bad header", "where": "a.safetensors", "expected": None, "got": "3",
        "hint": None,
    }  # fmt: skip


def test_an_unexpected_error_is_our_bug():
    payload = error_payload(KeyError("x\x1b"))
    assert payload["exit_code"] == 1
    assert payload["problems"][0]["what"] == "KeyError: 'x\\x1b'"
