"""The forms of a MODEL, as help and error messages name them."""

from __future__ import annotations

__all__ = ["FORMS", "KINDS"]

#: Form of a MODEL -> what it stands for.
FORMS = {
    "NAME": "torchvision's, e.g. resnet18",
    "timm:NAME": "timm's, e.g. timm:resnet18.a1_in1k",
    "hf-hub:NAME, local-dir:PATH": "as timm spells them; they bring their weights",
    "package.module:callable": "imported from the current directory, called without arguments",
    "FILE.py:callable": "the same in a file of Python",
    "FILE.pt2": "an exported program, written by torch.export.save",
}

#: The same in half a sentence.
KINDS = (
    "a MODEL is a torchvision name, timm:NAME, hf-hub:NAME, local-dir:PATH, "
    "package.module:callable, FILE.py:callable or a .pt2 file"
)
