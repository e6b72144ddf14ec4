"""Tensors of which each rank holds a part: DTensors, of FSDP2 and of tensor parallelism.

:func:`whole` and :func:`anywhere` are collectives: every rank has to come to them in the same
order.  What is computed of whole tensors is the same on every rank, so that whatever depends on it
is decided in the same way everywhere.

torch.distributed is not imported here: a model that has DTensors has brought it along.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxpath.private import unsharded_now

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

#: What to do where something is computed of whole tensors only.
GATHER = (
    "gather the weights first: torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
    "options=StateDictOptions(full_state_dict=True, cpu_offload=True)) on every rank, and load "
    "them into an unsharded copy of the model on rank 0"
)


def is_sharded(value: object) -> TypeIs[DTensor]:
    """Whether a value is a DTensor, whatever its placements."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether one of some tensors is a DTensor."""
    return any(map(is_sharded, tensors))


def is_sharded_model(model: object) -> bool:
    """Whether a model has DTensors."""
    return isinstance(model, nn.Module) and any_sharded((*model.parameters(), *model.buffers()))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, detached where it had to be gathered; a plain tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.full_tensor().detach()


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, in the tensor's own memory."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local().detach()


def placed(full: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, spread over the ranks as another one of its shape; nothing is sent."""
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    with torch.no_grad():
        copies = [Replicate()] * mesh.ndim
        every = DTensor.from_local(full.detach(), mesh, copies, run_check=False)
        spread: Tensor = every.redistribute(placements=like.placements)
    return spread


def empty_placed(shape: Iterable[int], dtype: torch.dtype, like: DTensor) -> Tensor:
    """Memory for a tensor of a shape on the ranks of another one.

    It is spread in the same way where it has the same shape, else along its first axis.
    """
    from torch.distributed.tensor import Replicate, Shard, empty

    sizes = tuple(shape)
    placements: Any = like.placements
    if sizes != tuple(like.shape):
        placements = [Shard(0) if sizes else Replicate()] * like.device_mesh.ndim
    made: Tensor = empty(
        sizes, dtype=dtype, device_mesh=like.device_mesh, placements=list(placements)
    )
    return made


def write_whole(out: Tensor, full: Tensor) -> None:
    """Write this rank's part of a whole tensor into ``out``."""
    local(out).copy_(local(placed(full, out)))


def refuse_sharded(model: object, what: str) -> None:
    """Refuse a model with DTensors where whole tensors are needed.

    Raises:
        ValueError: naming a parameter, and what to do.
    """
    if not isinstance(model, nn.Module):
        return
    name = next((name for name, _ in sharded_tensors(model)), None)
    if name is not None:
        raise ValueError(
            f"{name} is sharded (a DTensor, of which each rank holds a part), and {what} takes "
            f"whole tensors; {GATHER}. fxpath.analyze, fxpath.path_norm and fxpath.prune take a "
            "sharded model as it is"
        )


def check_resharded(model: object) -> None:
    """Refuse a model of which ``fully_shard`` holds whole parameters at the moment.

    Raises:
        ValueError: naming a module, and what to do.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(model, nn.Module):
        return
    for path, module in model.named_modules():
        if isinstance(module, fsdp.FSDPModule) and unsharded_now(module):
            raise ValueError(
                f"{path or 'the model itself'}: its parameters are gathered at the moment, in the "
                "number format of a forward pass, which may round them; reshard it on every rank "
                "first: [m.reshard() for m in model.modules() if isinstance(m, "
                "torch.distributed.fsdp.FSDPModule)]"
            )


def check_alike(tensors: Mapping[str, Tensor]) -> None:
    """Refuse plain tensors beside sharded ones that are not the same on every rank; a collective.

    Statistics of a batch norm are not, where each rank has seen other batches.

    Raises:
        ValueError: naming them, on all ranks, and what to do.
    """
    like = next(filter(is_sharded, tensors.values()), None)
    if like is None:
        return
    plain = {name: tensor for name, tensor in tensors.items() if not is_sharded(tensor)}
    differing = [name for name, tensor in plain.items() if not _is_alike(tensor, like)]
    if differing:
        raise ValueError(
            f"{', '.join(differing)}: not the same on every rank, so that each would find another "
            "result; send that of one rank to all: torch.distributed.broadcast(tensor, src=0) of "
            "each, or train with SyncBatchNorm"
        )


def _is_alike(tensor: Tensor, like: DTensor) -> bool:
    """Whether a tensor has the same bits on all ranks of another one."""
    from torch.distributed.tensor import DTensor, Partial

    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().view(kind).long()
    mesh = like.device_mesh
    least, most = (
        DTensor.from_local(bits, mesh, [Partial(which)] * mesh.ndim, run_check=False)
        for which in ("min", "max")
    )
    return torch.equal(whole(least), whole(most))


def sharded_tensors(model: nn.Module) -> Iterator[tuple[str, DTensor]]:
    """Parameters and buffers that are DTensors, tied ones under each of their names."""
    parameters = model.named_parameters(remove_duplicate=False)
    for name, tensor in (*parameters, *model.named_buffers(remove_duplicate=False)):
        if is_sharded(tensor):
            yield name, tensor


# -- stand-ins -------------------------------------------------------------------------------------


def stand_in(tensor: DTensor) -> Tensor:
    """A plain parameter of the same form without memory; of a replicated buffer, what it holds."""
    if not isinstance(tensor, nn.Parameter):
        return local(tensor)
    plain = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    plain.untyped_storage().resize_(0)
    return nn.Parameter(plain, tensor.requires_grad)


def own_class(module: object) -> type:
    """The class that a module had before ``fully_shard``."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    cls = type(module)
    if fsdp is None or not isinstance(module, fsdp.FSDPModule):
        return cls
    # FSDPLinear(FSDPModule, Linear)
    return next(base for base in cls.__mro__[1:] if not issubclass(base, fsdp.FSDPModule))


def is_shard_hook(hook: Any) -> bool:
    """Whether a hook gathers parameters, or moves activations between ranks, and no more."""
    name = getattr(hook, "__module__", None) or ""
    if _is_of_fsdp(hook):
        return True
    if not name.startswith("torch.distributed.tensor."):
        return False
    # A lambda of distribute_module around what torch's own plans, or the caller, gave it.
    inner = [_underlying(cell.cell_contents) for cell in getattr(hook, "__closure__", None) or ()]
    given = [each for each in inner if callable(each)]
    return all(
        (getattr(each, "__module__", None) or "").startswith("torch.distributed.tensor.")
        for each in given
    )


def _is_of_fsdp(function: Any) -> bool:
    return (getattr(function, "__module__", None) or "").startswith("torch.distributed.fsdp.")


def _underlying(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def without_shards(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """A module's own attributes without what ``fully_shard`` and ``distribute_module`` added."""
    kept = {}
    for name, value in attributes.items():
        if name.startswith(("__composable_api_state_key", "_fsdp_")):
            continue
        if isinstance(value, types.MethodType) and _is_of_fsdp(value):
            continue  # what register_fsdp_forward_method puts before a method
        if name in ("_forward_hooks", "_forward_pre_hooks"):
            value = type(value)((key, h) for key, h in value.items() if not is_shard_hook(h))
        kept[name] = value
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        for flags in (f"{name}_with_kwargs", f"{name}_always_called"):
            if flags in kept:
                known = kept[flags]
                kept[flags] = type(known)((k, v) for k, v in known.items() if k in kept[name])
    return kept
