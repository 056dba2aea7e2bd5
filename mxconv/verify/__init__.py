"""Verification: an artifact held to its source by the runtime, which never saw the plan that made it."""

from mxconv.verify.findings import Finding, Section
from mxconv.verify.limits import LIMITS, Limit
from mxconv.verify.metrics import METRICS_VERSION, Metrics
from mxconv.verify.options import Options
from mxconv.verify.report import Report
from mxconv.verify.run import verify

__all__ = ["LIMITS", "METRICS_VERSION", "Finding", "Limit", "Metrics", "Options", "Report", "Section", "verify"]
