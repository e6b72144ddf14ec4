"""The stand-in that is traced instead of the user's model."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["skeleton"]


class _Passthrough(nn.Module):
    """Stands for a data-parallel wrapper: the names stay, the scattering goes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class _SharedTensors(TorchFunctionMode):
    """While active, deep copies share their tensors, non-leaf ones included."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            return args[0]
        return func(*args, **(kwargs or {}))


def skeleton(model: nn.Module) -> nn.Module:
    """An eval-mode copy of the module tree that shares all tensors with ``model``.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
        >>> copied = skeleton(model)
        >>> copied.training, copied[0].weight is model[0].weight, model.training
        (False, True, True)
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                memo[id(tensor)] = _normal(tensor) if tensor.is_inference() else tensor
    with _SharedTensors():
        copied = copy.deepcopy(model, memo)
    for module in list(copied.modules()):
        for name, child in module.named_children():
            if _is_data_parallel(child):
                setattr(module, name, _Passthrough(child.get_submodule("module")))
    if _is_data_parallel(copied):
        copied = _Passthrough(copied.get_submodule("module"))
    return copied.eval()


def _normal(tensor: Tensor) -> Tensor:
    """A tensor that torch.export accepts, for one that was made in inference mode."""
    copied = tensor.detach().clone()
    return nn.Parameter(copied, False) if isinstance(tensor, nn.Parameter) else copied


def _is_data_parallel(module: nn.Module) -> bool:
    return isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel))
