"""Signatures over the manifest: made by the model-signing package, offline, with a key of this test; verified by `check`.

The package is an extra; without it what is tested is that `check` says so.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mxconv.artifact import read_manifest
from mxconv.execute import convert
from tests.faults.inprocess import run
from tests.synthetic import make_checkpoint

HAVE = importlib.util.find_spec("model_signing") is not None
signing = pytest.mark.skipif(not HAVE, reason="the extra mxconv[sign] is not installed")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("artifact")
    convert(make_checkpoint(root / "source"), root / "out", tp=2)
    return root / "out"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two key pairs on the curve P-256, as PEM files."""
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    from cryptography.hazmat.primitives.asymmetric import ec

    root, made = tmp_path_factory.mktemp("keys"), {}
    for name in ("ours", "theirs"):
        key = ec.generate_private_key(ec.SECP256R1())
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )  # fmt: skip
        public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        for kind, data in (("key", private), ("pub", public)):
            made[f"{name}.{kind}"] = root / f"{name}.{kind}"
            made[f"{name}.{kind}"].write_bytes(data)
    return made


@pytest.fixture(scope="module")
def signature(artifact: Path, keys: dict[str, Path]) -> Path:
    """As the documentation says: by the package's own command line."""
    path = artifact.parent / "out.sig"
    subprocess.run(
        [sys.executable, "-m", "model_signing", "sign", "key", artifact / "manifest.json", "--private_key", keys["ours.key"],
         "--signature", path],
        check=True, timeout=60, capture_output=True,
    )  # fmt: skip
    return path


@signing
def test_a_right_signature_holds(artifact: Path, keys: dict[str, Path], signature: Path) -> None:
    result = run("check", artifact, "--signature", signature, "--public-key", keys["ours.pub"])
    assert result.code == 0 and "ok   signature" in result.out and "every byte matches" in result.out
    document = json.loads(run("check", artifact, "--signature", signature, "--public-key", keys["ours.pub"], "--json").out)
    assert document["ok"] and document["signed_by"] == str(keys["ours.pub"])


@signing
def test_what_is_not_signed_does_not_hold(artifact: Path, keys: dict[str, Path], signature: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    convert(make_checkpoint(tmp_path / "source", seed=1), other, tp=2)
    forged = tmp_path / "forged.sig"
    raw = json.loads(signature.read_text())
    raw["dsseEnvelope"]["payload"] = raw["dsseEnvelope"]["payload"][:-8] + "AAAAAAAA"
    forged.write_text(json.dumps(raw))
    rubbish = tmp_path / "rubbish.sig"
    rubbish.write_text("{}")
    for folder, file, key in (
        (artifact, signature, "theirs.pub"), (other, signature, "ours.pub"), (artifact, forged, "ours.pub"),
        (artifact, rubbish, "ours.pub"),
    ):  # fmt: skip
        result = run("check", folder, "--signature", file, "--public-key", keys[key])
        assert result.code == 8 and "the signature does not hold" in result.err, (folder, file, key, result.err)


@signing
def test_a_signature_does_not_excuse_the_bytes(artifact: Path, keys: dict[str, Path], signature: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(artifact, tmp_path / "out"))
    shard = next((root / "rank1").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    result = run("check", root, "--signature", signature, "--public-key", keys["ours.pub"])
    assert result.code == 8 and "was changed" in result.err


@signing
def test_files_that_are_missing_or_no_key(artifact: Path, keys: dict[str, Path], signature: Path, tmp_path: Path) -> None:
    (tmp_path / "no.pem").write_text("x")
    for file, key, code in (
        (tmp_path / "none", keys["ours.pub"], 4), (signature, tmp_path / "none", 4), (signature, tmp_path / "no.pem", 2),
        (tmp_path, keys["ours.pub"], 3),
    ):  # fmt: skip
        assert run("check", artifact, "--signature", file, "--public-key", key).code == code


@pytest.mark.skipif(HAVE, reason="the extra is installed")
def test_without_the_extra_check_says_so(artifact: Path, tmp_path: Path) -> None:
    result = run("check", artifact, "--signature", tmp_path / "x.sig", "--public-key", tmp_path / "x.pub")
    assert result.code == 2 and "mxconv[sign]" in result.err


@pytest.mark.parametrize(
    "flags",
    [
        ("--signature", "x"), ("--public-key", "x"), ("--signature", "x", "--identity", "me"),
        ("--signature", "x", "--public-key", "y", "--identity", "me", "--identity-provider", "https://x"),
    ],
)  # fmt: skip
def test_someone_must_be_trusted(flags: tuple[str, ...], artifact: Path) -> None:
    assert run("check", artifact, *flags).code == 2


def test_the_expected_manifest(artifact: Path, tmp_path: Path) -> None:
    digest = read_manifest(artifact).sha256
    assert run("check", artifact, "--expect", digest).code == 0
    assert run("check", artifact, "--expect", digest[:16].upper()).code == 0
    assert run("check", artifact, "--expect", "0" * 64).code == 8
    for bad in (digest[:15], "x" * 64, digest + "0"):
        assert run("check", artifact, "--expect", bad).code == 2
    assert run("check", make_checkpoint(tmp_path / "source"), "--expect", digest).code == 4
