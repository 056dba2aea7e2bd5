"""Where settings come from, and what is refused."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxconv import parsing
from mxconv.errors import MxconvError, UsageError
from mxconv.parsing import Rejected
from mxconv.quantize.schemes import SCHEMES
from mxconv.settings import SETTINGS, Settings, resolve


def settle(tmp_path: Path, toml: str = "", environ: dict[str, str] | None = None, command: str | None = None, **flags) -> Settings:
    (tmp_path / "mxconv.toml").write_text(toml, encoding="utf-8")
    return resolve(flags, command=command, environ=environ or {}, cwd=tmp_path)


def refusal(tmp_path: Path, *args, **kwargs) -> str:
    with pytest.raises(MxconvError) as caught:
        settle(tmp_path, *args, **kwargs)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_table_and_fields_are_the_same_names():
    assert {field.name for field in fields(Settings)} == {*SETTINGS, "sources", "notes"}


def test_defaults(tmp_path):
    settings = resolve({}, environ={}, cwd=tmp_path)
    assert (settings.tp, settings.layout, settings.scheme, settings.memory) == (None, "fastdeploy", "w4afp8", 1 << 30)
    assert settings.workers >= 1 and settings.progress and not settings.json
    assert set(settings.sources.values()) == {"default"} and settings.describe() == []


def test_flag_over_variable_over_command_table_over_top_over_default(tmp_path):
    toml = 'scheme = "w4a8"\n[quantize]\nscheme = "block_wise_fp8"\n'
    variable = {"MXCONV_SCHEME": "tensor_wise_fp8"}
    where = f"{tmp_path / 'mxconv.toml'}: "
    for command, environ, flags, value, source in (
        ("quantize", variable, {"scheme": "w4afp8_static"}, "w4afp8_static", "--scheme"),
        ("quantize", variable, {"scheme": None}, "tensor_wise_fp8", "MXCONV_SCHEME"),
        ("quantize", {"MXCONV_SCHEME": ""}, {}, "block_wise_fp8", where + "quantize.scheme"),
        ("verify", {}, {}, "w4a8", where + "scheme"),
    ):
        settings = settle(tmp_path, toml, environ, command, **flags)
        assert (settings.scheme, settings.sources["scheme"]) == (value, source)


def test_flags_of_the_command_itself_are_left_alone_and_empty_ones_not_given(tmp_path):
    settings = settle(tmp_path, 'ignore = ["layers.0.*", "layers.1.*"]\n', source="model", out=Path("x"), ignore=(), tp=8)
    assert settings.ignore == ("layers.0.*", "layers.1.*") and settings.tp == 8
    assert settings.log()["tp"] == {"value": 8, "from": "--tp"} and settings.log()["drop"]["from"] == "default"


def test_limits_merge_name_by_name(tmp_path):
    toml = "[limits]\nkl = 0.1\nppl = 2\n[verify.limits]\nppl = 3\n"
    settings = settle(tmp_path, toml, {"MXCONV_LIMITS": "top1=0.5 kl=0.2"}, "verify", limits=("kl=0.3",))
    assert settings.limits == {"kl": 0.3, "top1": 0.5, "ppl": 3.0}


def test_paths_in_the_file_are_relative_to_it(tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "my.toml").write_text('calibration = "ids.npy"\n')
    settings = resolve({"config": folder / "my.toml"}, environ={}, cwd=tmp_path)
    assert settings.calibration == folder / "ids.npy"
    assert resolve({"calibration": "ids.npy"}, environ={}, cwd=tmp_path).calibration == Path("ids.npy")
    assert resolve({}, environ={"MXCONV_CONFIG": str(folder / "my.toml")}, cwd=tmp_path).calibration == folder / "ids.npy"


def test_unknown_keys_name_file_key_and_the_nearest(tmp_path):
    text = refusal(tmp_path, 'memroy = "2GiB"\n[verify]\nscheem = "w4a8"\n[quantise]\n')
    assert text.startswith("3 problems")
    assert f"{tmp_path / 'mxconv.toml'}: unknown key 'memroy'" in text and "did you mean 'memory'?" in text
    assert "unknown key 'verify.scheem'" in text and "did you mean 'scheme'?" in text
    assert "unknown key 'quantise'" in text and "did you mean 'quantize'?" in text


def test_everything_wrong_is_listed_at_once(tmp_path):
    text = refusal(tmp_path, 'tp = 0\nquantize = 3\ndevice = "gpu"\n', {"MXCONV_WORKERS": "many"}, "convert", memory="lots")
    assert text.startswith("5 problems")
    for part in (": tp: ", "MXCONV_WORKERS", "--memory: ", ": device: ", "expected [quantize]"):
        assert part in text


def test_a_wrong_value_is_refused_even_where_a_flag_wins(tmp_path):
    assert "mxconv.toml: tp" in refusal(tmp_path, "tp = true\n", tp=2)


def test_a_near_scheme_is_named(tmp_path):
    assert "did you mean block_wise_fp8?" in refusal(tmp_path, scheme="blockwise_fp8")


@pytest.mark.parametrize("content", [b"a = [", b"tp = 1\ntp = 2\n", b"\xff\xfe", b"a=" + b"[" * 100_000, b"#" * (2 << 20)])
def test_a_broken_file_is_a_usage_error(tmp_path, content):
    (tmp_path / "mxconv.toml").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        resolve({}, environ={}, cwd=tmp_path)
    assert "mxconv.toml" in str(caught.value)


def test_a_named_file_must_be_a_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name in ("absent.toml", "fifo", "."):
        with pytest.raises(UsageError):
            resolve({"config": tmp_path / name}, environ={}, cwd=tmp_path)


def test_an_unknown_variable_is_noted(tmp_path):
    settings = settle(tmp_path, "", {"MXCONV_MEMROY": "1GiB", "MXCONV_KERNELS": "torch", "HOME": "/"})
    assert settings.notes == ("environment variable MXCONV_MEMROY is not one that mxconv reads; did you mean MXCONV_MEMORY?",)


def test_a_choice_of_kernels_that_there_is_not(tmp_path):
    with pytest.raises(UsageError, match="unknown MXCONV_KERNELS"):
        settle(tmp_path, "", {"MXCONV_KERNELS": "cuda"})


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1073741824", 1 << 30), (7, 7), ("1GiB", 1 << 30), ("2 GiB", 2 << 30), ("512M", 512 << 20), ("1.5g", 3 << 29),
        ("800MB", 800_000_000), ("1kB", 1000), ("1KiB", 1024), ("64B", 64), ("0.5TiB", 1 << 39), (" 4GiB ", 4 << 30),
    ],
)  # fmt: skip
def test_sizes(text, size):
    assert parsing.size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "", "0", "-1", "1.5", "1.5B", "GiB", "1 Gi B", "1e9", "1_000", "nan", "inf", "2XB", "1GiBs", "٣GiB", 0, -5, 1.5, True, None,
        "9" * 30,
    ],
)  # fmt: skip
def test_sizes_are_strict(text):
    with pytest.raises(Rejected):
        parsing.size(text)


SCALARS = st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.none())


@given(st.one_of(SCALARS, st.lists(SCALARS), st.dictionaries(st.text(), SCALARS)))
def test_readers_return_or_reject(value):
    for setting in SETTINGS.values():
        try:
            setting.parse(value)
        except Rejected as rejected:
            assert rejected.expected


@pytest.mark.parametrize(("value", "result"), [("channel", "channel"), ("256", 256), (128, 128)])
def test_group_sizes(value, result):
    assert parsing.group_size(value) == result


@pytest.mark.parametrize("value", [0, 64, "-128", "row", 128.0, True])
def test_group_sizes_refused(value):
    with pytest.raises(Rejected):
        parsing.group_size(value)


@pytest.mark.parametrize(("value", "result"), [("yes", True), ("ON", True), ("0", False), (True, True), ("False", False)])
def test_flags(value, result):
    assert parsing.flag(value) is result


@pytest.mark.parametrize("value", ["kl", "kl=", "kl=x", "kl=-1", "kl=nan", "=1", {"kl": True}, {"kl": "high"}, ["a=1", 3]])
def test_limits_refused(value):
    with pytest.raises(Rejected):
        parsing.limits(value)


def test_every_scheme_can_be_asked_for(tmp_path):
    for scheme in SCHEMES:
        assert settle(tmp_path, scheme=scheme).scheme == scheme
