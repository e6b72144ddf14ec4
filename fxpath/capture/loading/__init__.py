"""Models, checkpoints and programs from names and files; no file that is read executes anything.

- `models`: what a MODEL argument of the command line stands for.
- `libraries`: models of torchvision and timm by name.
- `callables`, `beside`: models that the user's own code makes, which alone runs.
- `archives`, `vetting`: `.pt2` files, read without pickle and without evaluating their strings.
- `certificates`: what files claim of the weights that they hold.
- `checkpoints`: files of weights, as training frameworks write them.
- `candidates`, `states`: which of a file's tensors are a model's, by content.
"""

from fxpath.capture.loading.models import Model, drawn, load_model
from fxpath.capture.loading.states import fit_state_dict
from fxpath.capture.loading.words import UsageError, one_line

__all__ = ["Model", "UsageError", "drawn", "fit_state_dict", "load_model", "one_line"]
