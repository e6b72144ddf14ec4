"""The rules of the path-lifting, one entry per ATen operation.

``affine`` weighs and adds, ``activation`` has ReLU and its relatives, ``spatial`` what works along
axes with fixed coefficients, ``shape`` what only moves entries, ``refused`` explains the best-known
operations that the theory does not cover.
"""

from fxpath.rules import activation, affine, shape, spatial
from fxpath.rules.refused import refusal
from fxpath.rules.registry import RULES, Refusal

__all__ = ["RULES", "Refusal", "activation", "affine", "refusal", "shape", "spatial"]
