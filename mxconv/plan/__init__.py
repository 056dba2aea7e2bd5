"""The plan: a pure, printable value made from headers and a request."""

from mxconv.plan.build import build_plan
from mxconv.plan.values import GroupSize, Op, Output, Piece, Plan, Request, Unit

__all__ = ["GroupSize", "Op", "Output", "Piece", "Plan", "Request", "Unit", "build_plan"]
