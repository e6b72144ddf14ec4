"""What the lifted program runs, as opaque operators in the namespace ``torch.ops.fxpath``.

``torch.compile`` calls an opaque operator as it is.  That keeps compiling cheap, since no code is
generated for the hundreds of tiny steps between two layers, and it lets large weights stream
through the cache in blocks of rows: |W| is formed, used, and turned into scores while it is there.
"""

from fxpath.program.kernels import products, scales, weights
from fxpath.program.kernels.scales import least

__all__ = ["least", "products", "scales", "weights"]
