"""How a model is taken in: a module or an exported program becomes one flat functional ATen graph.

``shapes`` finds the input shape of a model that comes without one, ``inputs`` makes the call that
is traced, ``trace`` runs torch.export, ``functional`` is the pass that removes in-place operations,
``adopt`` tidies the graph, and ``export`` puts them together.  ``loading`` reads models by name and
from files.
"""

from fxpath.capture.export import capture
from fxpath.capture.shapes import infer_input_shape

__all__ = ["capture", "infer_input_shape"]
