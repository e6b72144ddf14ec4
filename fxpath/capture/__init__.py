"""How a model is taken in: a module or an exported program becomes one flat functional ATen graph.

``model`` holds what a captured model is, ``given`` what a caller says about inputs and outputs,
``copies`` the stand-in that is traced instead of the user's model, ``shapes`` the input shape of a
model that comes without one, ``functional`` the pass that removes in-place operations, and
``export`` puts them together.
"""

from fxpath.capture.copies import skeleton
from fxpath.capture.export import capture
from fxpath.capture.given import Given, Shapes
from fxpath.capture.model import Captured, Model, Shape, check_finite, named_tensors
from fxpath.capture.shapes import infer_input_shape

__all__ = [
    "Captured",
    "Given",
    "Model",
    "Shape",
    "Shapes",
    "capture",
    "check_finite",
    "infer_input_shape",
    "named_tensors",
    "skeleton",
]
