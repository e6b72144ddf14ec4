"""Memory of the caller's that scores are written into."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fxpath.private import internal_overlap


def writable(out: Tensor, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a run can keep its scores there while it goes on."""
    return (
        out.dtype == dtype
        and out.device == device
        and out.is_contiguous()
        and not out.requires_grad
        and not out.is_inference()
    )


def check_buffers(
    out: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], read: Mapping[str, Tensor]
) -> None:
    """Refuse tensors that scores cannot be written into.

    Args:
        out: the caller's tensors by name.
        shapes: the scores' shapes by name.
        read: the model's own tensors by name.

    Raises:
        ValueError: for other names or shapes, integers, memory that is shared between two of them,
            or with the model.
    """
    if out.keys() != shapes.keys():
        difference = sorted(out.keys() ^ shapes.keys())
        raise ValueError(f"out must have one tensor for each score; differs in {difference}")
    for name, shape in shapes.items():
        if out[name].shape != shape:
            raise ValueError(f"out[{name!r}] has shape {tuple(out[name].shape)}, its score {shape}")
        if not out[name].is_floating_point():
            raise ValueError(f"out[{name!r}] holds {out[name].dtype}, which has no shares below 1")
        if out[name].layout != torch.strided or out[name].is_meta:
            kind = "the meta device" if out[name].is_meta else out[name].layout
            raise ValueError(f"out[{name!r}] is on {kind}: pass a dense tensor that has values")
        if out[name].is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(f"out[{name!r}] was made in inference mode: pass a clone of it")
        if _overlaps(out[name]):
            raise ValueError(f"out[{name!r}] has several entries in one place: pass a clone of it")
    ours = [(f"out[{name!r}]", tensor) for name, tensor in out.items()]
    theirs = [(f"the model's {name}", tensor) for name, tensor in read.items()]
    _check_apart(ours, theirs)


def _overlaps(tensor: Tensor) -> bool:
    """Whether two entries of a tensor are in one place."""
    known = internal_overlap(tensor)
    if known is not None:
        return known
    offsets = torch.zeros((), dtype=torch.int64)
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets[..., None] + stride * torch.arange(length)
    return offsets.unique().numel() < offsets.numel()


def _check_apart(ours: Iterable[tuple[str, Tensor]], theirs: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse buffers that reach into each other's memory, or into the model's."""
    spans = sorted(
        (str(tensor.device), *_span(tensor), own, name)
        for own, tensors in ((True, ours), (False, theirs))
        for name, tensor in tensors
        if tensor.numel() and tensor.layout == torch.strided
    )
    # The buffer, and the tensor of the model, that reach farthest among those that began before.
    farthest: dict[bool, tuple[str, int, str]] = {}
    for device, start, end, own, name in spans:
        for kind, (where, reach, other) in farthest.items():
            if (own or kind) and where == device and start < reach:
                raise ValueError(
                    f"{name} shares memory with {other}: scores are written while weights are read,"
                    " so pass tensors of their own, e.g. {n: torch.empty_like(s) for n, s in "
                    "program.scores().items()}"
                )
        where, reach, _ = farthest.get(own, (device, 0, ""))
        if where != device or end > reach:
            farthest[own] = (device, end, name)


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte of a tensor's entries, and the first one behind them."""
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def check_holds(name: str, share: Tensor, out: Tensor) -> None:
    """Refuse a format in which shares would become zeros, and ties.

    Raises:
        ValueError: naming the buffer and a format that holds them.
    """
    if bool(((share > 0) & (share < torch.finfo(out.dtype).tiny)).any()):
        raise ValueError(
            f"out[{name!r}] holds {out.dtype}, in which some of its shares would be zero: pass a "
            "tensor of torch.float64"
        )
