"""Artifacts on disk: written so that a crash loses nothing and publishes nothing, named by a manifest, checked against it.

A run is

    with open_output(root, plan_digest=…, resume=…, overwrite=…) as output:
        if output.finished is None:
            with ArtifactWriter(output, files=…, units=…) as writer:
                for unit in units not in writer.done:
                    outputs = [writer.write(region, data) for region, data in …]
                    writer.commit(unit, source_sha256=…, outputs=outputs)
                publish(writer, indexes=…, sidecars=…, config=…, manifest=…)
"""

from mxconv.artifact.check import CheckReport, check_artifact, check_folder, check_source, missing_files
from mxconv.artifact.manifest import FileFact, Manifest, TensorFact, find_artifact, read_manifest, require_artifact
from mxconv.artifact.output import Output, open_output
from mxconv.artifact.parts import FileHash, Parts, Region
from mxconv.artifact.publishing import append_run_log, publish, put
from mxconv.artifact.tree import tree_digest
from mxconv.artifact.writer import ArtifactWriter

__all__ = [
    "ArtifactWriter",
    "CheckReport",
    "FileFact",
    "FileHash",
    "Manifest",
    "Output",
    "Parts",
    "Region",
    "TensorFact",
    "append_run_log",
    "check_artifact",
    "check_folder",
    "check_source",
    "find_artifact",
    "missing_files",
    "open_output",
    "publish",
    "put",
    "read_manifest",
    "require_artifact",
    "tree_digest",
]
