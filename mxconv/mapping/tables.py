"""Every table by name. A new family or layout is one new file and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from mxconv.mapping.fastdeploy import FASTDEPLOY
from mxconv.mapping.minimax import MINIMAX
from mxconv.mapping.minimax_m1 import MINIMAX_M1
from mxconv.mapping.rules import Table

TABLES: Mapping[str, Table] = MappingProxyType({table.name: table for table in (MINIMAX_M1, MINIMAX, FASTDEPLOY)})
