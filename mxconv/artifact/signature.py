"""Signatures over `manifest.json`, made and read by the `model-signing` package (OpenSSF; the extra `mxconv[sign]`).

The manifest pins every byte of an artifact, so that one small file is all that is signed: whoever holds the key needs no shard, and
`check` hashes the artifact once. The signature file is a Sigstore bundle (DSSE, an in-toto statement) and lies anywhere, commonly
beside the folder.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxconv.artifact.names import MANIFEST_NAME
from mxconv.errors import IncompleteInput, IntegrityError, MxconvError, UsageError
from mxconv.jsonfiles import read_regular

MAX_SIGNATURE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """Whom a signature must come from: the holder of a private key, or an identity that an OpenID provider vouches for.

    `public_key` is a PEM file (offline); `identity` and `identity_provider` are for keyless Sigstore signatures, whose trust root
    the package fetches.
    """

    public_key: Path | None = None
    identity: str | None = None
    identity_provider: str | None = None

    def require(self) -> None:
        """Raise UsageError unless exactly one of the two ways is given whole."""
        keyless = self.identity is not None or self.identity_provider is not None
        if (self.public_key is not None) == keyless or (keyless and not (self.identity and self.identity_provider)):
            raise UsageError(
                "a signature needs someone to trust", expected="--public-key FILE, or --identity NAME with --identity-provider URL"
            )


def verify_signature(root: Path, signature: Path, trust: Trust) -> None:
    """Check that `signature` is over the manifest of the artifact in `root` and comes from `trust`.

    Raises UsageError (2) without the extra or with a key that is none, IncompleteInput (4) for a missing file, IntegrityError (8)
    for a signature that does not hold, whatever the reason: another key, another manifest, a file that is no signature.
    """
    trust.require()
    verifying = _package()
    for path in (signature, trust.public_key):
        if path is not None:
            read_regular(path, MAX_SIGNATURE_BYTES)  # 3 or 4, before the package opens it in its own way
    config = _verifier(verifying, trust)
    try:
        config.verify(root / MANIFEST_NAME, signature)
    except Exception as error:  # the package raises ValueError, KeyError, and what its parsers raise
        raise IntegrityError(
            "the signature does not hold", where=signature, got=str(error) or type(error).__name__,
            expected=f"a signature by {_name(trust)} over {root / MANIFEST_NAME}",
        ) from None  # fmt: skip


def _package() -> Any:
    try:
        return importlib.import_module("model_signing").verifying
    except ImportError as error:
        raise UsageError(
            f"signatures need the model-signing package ({error})", hint="pip install 'mxconv[sign]'"
        ) from None  # fmt: skip


def _verifier(verifying: Any, trust: Trust) -> Any:
    config = verifying.Config()
    if trust.public_key is None:
        use: Callable[..., Any] = config.use_sigstore_verifier
        return use(identity=trust.identity, oidc_issuer=trust.identity_provider)
    try:
        return config.use_elliptic_key_verifier(public_key=trust.public_key)
    except Exception as error:
        raise UsageError("not a public key in PEM form", where=trust.public_key, got=str(error)) from None


def _name(trust: Trust) -> str:
    return str(trust.identity if trust.public_key is None else trust.public_key)


def parse_digest(text: str) -> str:
    """64 lower-case hexadecimal digits, or the first 16 or more of them, as the runs print them; else UsageError (2)."""
    digits = text.lower()
    if not 16 <= len(digits) <= 64 or not set(digits) <= set("0123456789abcdef"):
        raise UsageError("not a digest of a manifest", expected="16 to 64 hexadecimal digits", got=text)
    return digits


def manifest_problems(found: str | None, expected: str, root: Path) -> list[MxconvError]:
    """What is wrong with a manifest's SHA-256: IncompleteInput (4) without one, IntegrityError (8) if not the one expected."""
    if found is None:
        return [IncompleteInput(f"there is no {MANIFEST_NAME} to compare", where=root, expected=expected)]
    if not found.startswith(expected):
        return [IntegrityError("this is another artifact than the one expected", where=root, expected=expected, got=found)]
    return []
