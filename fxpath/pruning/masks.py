"""Masks in files and in models: what pruning decided, apart from the weights it was decided on."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from fxpath.model import named_tensors
from fxpath.private import forward_hooks, forward_pre_hooks, pruned_name
from fxpath.sharding import refuse_sharded

#: What a file of masks says that it is.
FORMAT = "fxpath.masks/1"


class Masks(dict[str, Tensor]):
    """Masks by parameter name, as :func:`load_masks` reads them.

    Attributes:
        metadata: what the file says about them: ``format``, the ``criterion``, and the SHA-256 of
            the state dicts before (``dense``) and after (``pruned``), see
            :func:`fxpath.certificate.fingerprint`, and a certificate (``fxpath.json``).
    """

    def __init__(self, masks: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        super().__init__(masks)
        self.metadata = dict(metadata)


def deep_copy(model: nn.Module) -> nn.Module:
    """A deep copy, also of a module in which a forward pass left what masks make of weights.

    Raises:
        ValueError: for a sharded model.
    """
    refuse_sharded(model, "a deep copy of a model")
    memo: dict[int, Any] = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(model, memo)


def write_masks(path: str | Path, masks: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write masks into a safetensors file."""
    stored = {name: mask.cpu().contiguous() for name, mask in masks.items()}
    save_file(stored, path, {"format": FORMAT, **metadata})


def load_masks(path: str | Path) -> Masks:
    """Read masks that :meth:`fxpath.Pruned.save` wrote.

    Args:
        path: a safetensors file.

    Returns:
        Parameter name -> bool tensor of its shape, True = kept; with the file's ``metadata``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no file of masks.

    Example:
        >>> import tempfile, fxpath
        >>> layer = nn.Linear(3, 2)
        >>> path = Path(tempfile.mkdtemp()) / "masks.safetensors"
        >>> fxpath.prune(layer, 0.5).save(path)
        >>> masks = load_masks(path)
        >>> int(masks["weight"].sum()), masks.metadata["criterion"]
        (3, 'path_magnitude')
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            masks = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: no safetensors file ({error})") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path}: its format is {metadata.get('format')!r} and not {FORMAT!r}: it holds no "
            "masks of fxpath.prune"
        )
    wrong = [name for name, mask in masks.items() if mask.dtype != torch.bool]
    if wrong:
        raise ValueError(f"{path}: {', '.join(wrong)} are no masks, which have True and False")
    return Masks(masks, metadata)


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Hold masked entries of a model at zero, in training too, by ``torch.nn.utils.prune``.

    The model is changed, as by torch's own functions: each masked parameter ``weight`` becomes
    ``weight_orig`` and a buffer ``weight_mask``, and their product is what the layer reads, at
    every call.  Both are in the state dict.  Unlike there, a weight is also masked and trained
    where its layer is not called but read (``F.linear(x, self.encoder.weight.t())``), and the model
    can be deep-copied after a backward pass; both where the module that was passed here is called,
    and not a part of it.  ``torch.nn.utils.prune.remove`` makes the zeros final.

    Args:
        model: the module that was pruned, or another one with the same parameters (rewound
            weights).  A tied parameter is masked in every module that holds it.
        masks: parameter name -> bool tensor of its shape, True = kept; those of
            :attr:`fxpath.Pruned.masks` or :func:`load_masks`.

    Returns:
        The model itself.

    Raises:
        ValueError: for a name that is no parameter of a module, another shape or dtype, a
            parametrized weight, a sharded model; then nothing is changed.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -4.0]]))
        >>> _ = apply_masks(layer, {"weight": torch.tensor([[True, False]])})
        >>> layer(torch.ones(2)).item(), sorted(layer.state_dict())
        (3.0, ['weight_mask', 'weight_orig'])
    """
    refuse_sharded(model, "torch.nn.utils.prune")
    places = [place for name, mask in masks.items() for place in _places(model, name, mask)]
    for module, attribute, mask in places:
        torch_prune.custom_from_mask(module, attribute, mask)
    if places and _settle not in forward_hooks(model).values():
        model.register_forward_pre_hook(_refresh)
        model.register_forward_hook(_settle)
    return model


def refresh(model: nn.Module) -> None:
    """Compute masked weights anew, which ``torch.nn.utils.prune`` does when a layer is called."""
    for module, method in _methods(model):
        setattr(module, pruned_name(method), method.apply_mask(module))


def held_masks(model: nn.Module) -> dict[str, Tensor]:
    """Masks that ``torch.nn.utils.prune`` holds in a model, by the names of the weights read."""
    paths = {module: path for path, module in model.named_modules()}
    found = {}
    for module, method in _methods(model):
        name = f"{paths[module]}.{pruned_name(method)}".removeprefix(".")
        found[name] = getattr(module, f"{pruned_name(method)}_mask")
    return found


def _refresh(model: nn.Module, args: Any) -> None:
    """Before a call: masked weights, those too that are read without their layer being called."""
    refresh(model)


def _settle(model: nn.Module, args: Any, output: Any) -> None:
    """After a call of the whole model: what was computed is kept without the call's graph.

    ``copy.deepcopy`` fails on that.  A layer alone cannot tell whether another one, a decoder that
    reads the encoder's weight, is yet to come.
    """
    for module, method in _methods(model):
        value = vars(module).get(pruned_name(method))
        if isinstance(value, Tensor):
            setattr(module, pruned_name(method), value.detach())


def _methods(model: nn.Module) -> Iterator[tuple[nn.Module, torch_prune.BasePruningMethod]]:
    for module in model.modules():
        for hook in forward_pre_hooks(module).values():
            if isinstance(hook, torch_prune.BasePruningMethod):
                yield module, hook


def _places(model: nn.Module, name: str, mask: Tensor) -> list[tuple[nn.Module, str, Tensor]]:
    """The modules that hold a parameter, its name there, and its mask."""
    path, _, attribute = name.rpartition(".")
    holder = dict(model.named_modules(remove_duplicate=False)).get(path)
    if holder is not None and parametrize.is_parametrized(holder, attribute):
        raise ValueError(
            f"{name}: parametrized; take that off first "
            "(torch.nn.utils.parametrize.remove_parametrizations)"
        )
    named = named_tensors(model)
    parameter = named.get(name, named.get(f"{name}_orig"))
    if holder is None or not isinstance(parameter, nn.Parameter):
        raise ValueError(f"{name}: the model has no such parameter")
    if isinstance(holder, (nn.ParameterList, nn.ParameterDict)):
        raise ValueError(
            f"{name}: in a {type(holder).__name__}, which is never called, so that no mask would "
            "be applied; make it a parameter of the module that reads it"
        )
    if mask.dtype != torch.bool or mask.shape != parameter.shape:
        raise ValueError(
            f"{name}: a mask is a bool tensor of shape {tuple(parameter.shape)}, and this is "
            f"{mask.dtype} {tuple(mask.shape)}"
        )
    on_device = mask.to(parameter.device)
    return [
        (module, key.removesuffix("_orig"), on_device)
        for module in model.modules()
        for key, held in module._parameters.items()
        if held is parameter
    ]
