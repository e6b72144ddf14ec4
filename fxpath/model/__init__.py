"""What is handed in: a model, its tensors, what a caller says about inputs, and its stand-in.

``captured`` holds what a captured model is and whose tensors its graph reads, ``form`` what else
about the model the graph is made for, ``given`` what a caller says about inputs and outputs,
``copies`` the stand-in that is traced instead of the user's model, ``state`` what a trace must
leave untouched.
"""

from fxpath.model.captured import Captured, Model, Shape, check_finite, named_tensors
from fxpath.model.copies import skeleton
from fxpath.model.given import Given, Shapes

__all__ = [
    "Captured",
    "Given",
    "Model",
    "Shape",
    "Shapes",
    "check_finite",
    "named_tensors",
    "skeleton",
]
