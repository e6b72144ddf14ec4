"""Shares as data for graph viewers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Colours of the smallest and of the largest share; the text stays readable on both.
_LEAST, _MOST = "#f7fbff", "#6baed6"


def overlay(shares: Mapping[str, float]) -> dict[str, Any]:
    """Node data for Model Explorer, which colours nodes by value.

    Args:
        shares: node of the exported program -> share of path mass.
    """
    return {
        # The one graph that Model Explorer makes of an exported program has this name.
        "graph": {
            "name": "share of path mass",
            "results": {node: {"value": share} for node, share in shares.items()},
            "gradient": [{"stop": 0, "bgColor": _LEAST}, {"stop": 1, "bgColor": _MOST}],
        }
    }
