"""Opening both sides of a verification, and everything about them that can be seen without reading weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from mxconv.artifact import Manifest
from mxconv.config import ModelConfig, read_config
from mxconv.errors import MxconvError, ResourceError, UsageError
from mxconv.progress import Progress
from mxconv.quantize.schemes import Scheme, scheme_from_block
from mxconv.runtime import Weights, open_weights
from mxconv.verify import serving, structure
from mxconv.verify.consumer import consumer_warnings, fastdeploy_rules
from mxconv.verify.findings import Finding, from_error
from mxconv.verify.options import Options

T = TypeVar("T")


@dataclass(slots=True, kw_only=True)
class Subject:
    """The artifact and its source as far as they could be opened."""

    root: Path
    manifest: Manifest
    options: Options
    progress: Progress
    config: ModelConfig | None = None
    scheme: Scheme | None = None
    weights: Weights | None = None
    merged: Weights | None = None
    """The artifact's ranks put together; None where it has one."""
    source: Weights | None = None
    """The source cut into as many ranks as the artifact."""
    _opened: list[Weights] = field(default_factory=list)

    def close(self) -> None:
        """Close every file."""
        for weights in self._opened:
            weights.close()

    def look(self) -> serving.Served:
        """Everything that can be seen without reading weights; opens artifact and source."""
        root, manifest = self.root, self.manifest
        served = serving.Served()
        self.progress.start("verify: structure", 0)
        served.findings += structure.look_at_files(root, manifest, hash_files=self.options.hash_files, progress=self.progress)
        source = None if self.options.source is None else read_config(self.options.source)
        config = self._attempt(served, "config", lambda: read_config(root))
        if config is not None:
            self.config = config
            self._look_at_config(served, config, source)
        ranks = self._attempt(served, "headers", lambda: structure.rank_shards(root))
        if ranks is not None:
            served.findings += structure.look_at_headers(root, manifest, ranks)
        if config is not None and ranks is not None:
            self._open(served)
        if self.weights is not None and ranks is not None:
            served.findings += structure.look_at_tensors(self.weights, ranks)
            served.lines.insert(0, inventory(manifest))
        return served

    def _look_at_config(self, served: serving.Served, config: ModelConfig, source: ModelConfig | None) -> None:
        block = config.artifact
        if block is None:
            served.findings.append(Finding(check="config", what="there is no mxconv block", key="mxconv"))
            return
        self._check_tp(block.get("tp"), per_rank=block.get("layout") == "fastdeploy")
        scheme = self._attempt(served, "config", lambda: scheme_from_block(block, "config.json"))
        self.scheme = scheme
        if block.get("layout") == "fastdeploy" and (scheme is not None or block.get("scheme") is None):
            served.findings += fastdeploy_rules(config.raw, scheme)
        origin = self.manifest.body.get("source")
        if source is not None:
            kept = origin.get("config") if isinstance(origin, dict) else None
            served.findings += structure.look_at_config(config, source, kept if isinstance(kept, dict) else None)
        served.warnings += consumer_warnings(block)
        text = serving.look_at_text(self.root, self.options.source, config)
        for name in ("findings", "warnings", "lines"):
            getattr(served, name).extend(getattr(text, name))

    def _check_tp(self, own: object, *, per_rank: bool) -> None:
        if per_rank and self.options.tp is not None and self.options.tp != own:
            raise UsageError(
                f"this artifact is cut into {own} ranks and cannot be verified as {self.options.tp}", where=self.root,
                expected=f"--tp {own}", got=f"--tp {self.options.tp}", hint="leave --tp out: the artifact knows its own",
            )  # fmt: skip

    def _attempt(self, served: serving.Served, check: str, step: Callable[[], T]) -> T | None:
        """`step`, what it raises about the artifact becoming findings."""
        try:
            return step()
        except ResourceError:
            raise
        except MxconvError as error:
            served.findings += from_error(error, check)
            return None

    def _open(self, served: serving.Served) -> None:
        options = self.options

        def opened(merge: bool) -> Weights:
            weights = open_weights(self.root, tp=options.tp, merge=merge, keep_decay=options.keep_decay)
            self._opened.append(weights)
            return weights

        known = {finding.render() for finding in served.findings}
        errors = serving.Served()
        self.weights = self._attempt(errors, "tensors", lambda: opened(False))
        served.findings += [finding for finding in errors.findings if finding.render() not in known]
        if self.weights is not None and self.weights.tp > 1:
            self.merged = self._attempt(served, "tensors", lambda: opened(True))
        if options.source is not None and self.weights is not None:
            self.source = self.cut_source(options.source, self.weights.tp)

    def cut_source(self, path: Path, tp: int | None) -> Weights:
        """The source cut into `tp` simulated ranks, or whole (None)."""
        block = read_config(path).artifact or {}
        own = block.get("tp", 1) if block.get("layout") == "fastdeploy" else None
        if own is not None and tp is not None and tp != own:
            raise UsageError(
                f"the source is an artifact of {own} ranks and cannot be cut into {tp}", where=path,
                hint="verify against the checkpoint that both were made from",
            )  # fmt: skip
        weights = open_weights(path, tp=tp, merge=tp is None, keep_decay=self.options.keep_decay)
        self._opened.append(weights)
        return weights


def tensors(manifest: Manifest) -> int:
    """How many tensors the artifact has."""
    return sum(len(fact.tensors) for fact in manifest.files.values())


def inventory(manifest: Manifest) -> str:
    """`15,923 tensors in 54 files`."""
    weights = sum(bool(fact.tensors) for fact in manifest.files.values())
    return f"{tensors(manifest):,} tensors in {weights:,} files"
