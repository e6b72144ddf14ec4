"""What keeps the tensors of a sharded model from being gathered, or their scores from being spread.

Such a model is traced as it was before its tensors were shared out: see
:func:`fxpath.model.copies.duplicate`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from fxpath.errors import Problem
from fxpath.model.form import held
from fxpath.sharding import is_sharded, sharded_tensors

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def shard_problems(model: nn.Module) -> list[Problem]:
    """What keeps a model's tensors from being gathered, or their scores from being spread."""
    found = [*_wrapped(model)]
    if found:
        # It has no parameters of its own to look at.
        return found
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for name, tensor in sharded_tensors(model):
        why = _ungatherable(tensor, name in buffers)
        if why is not None:
            found.append(_problem("DTensor", name.rpartition(".")[0], f"{name}: {why[0]}", why[1]))
    for name, loose in held(model).items():
        if is_sharded(loose):
            path = name.rpartition(".")[0]
            why = f"{name}: no parameter and no buffer", "register it as the one or the other"
            found.append(_problem("DTensor", path, *why))
    return found


def _wrapped(model: nn.Module) -> Iterator[Problem]:
    """The first module of FSDP1."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for path, module in model.named_modules():
        if isinstance(module, fsdp.FullyShardedDataParallel):
            yield _problem(
                "FullyShardedDataParallel",
                path,
                "FSDP1 keeps its parameters flattened into one, so that no rank knows the part of "
                "a layer that it holds",
                "wrap the model by torch.distributed.fsdp.fully_shard in its place, or analyse "
                "model.module within FullyShardedDataParallel.summon_full_params(model), which "
                "holds the whole model on each rank",
            )
            return


def _ungatherable(tensor: DTensor, is_buffer: bool) -> tuple[str, str] | None:
    """Why a DTensor is refused, and what to do."""
    if any(placement.is_partial() for placement in tensor.placements):
        return (
            "its placement is Partial, a sum that is still to be taken over the ranks, of which "
            "no score can be spread in that way",
            "take the sum: tensor.redistribute(placements=[Replicate()])",
        )
    if tensor.device_mesh.get_coordinate() is None:
        return (
            f"this rank is not in its mesh ({tensor.device_mesh})",
            "call fxpath on the ranks of that mesh only",
        )
    if is_buffer and not all(placement.is_replicate() for placement in tensor.placements):
        return (
            "it is a buffer that is sharded, and the graph may be made for its numbers",
            "keep it whole on each rank: buffer.redistribute(placements=[Replicate()])",
        )
    return None


def _problem(operation: str, path: str, reason: str, remedy: str) -> Problem:
    return Problem(operation, "(capture)", path, "unknown", reason, remedy)
