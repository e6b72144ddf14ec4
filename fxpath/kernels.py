"""What the lifted program runs, as opaque operators in the namespace ``torch.ops.fxpath``.

``torch.compile`` calls an opaque operator as it is.  That keeps compiling cheap, since no code is
generated for the hundreds of tiny steps between two layers, and it lets large weights stream
through the cache in blocks of rows: |W| is formed, used, and turned into scores while it is there.

Scales are powers of two and live on the host, as 1-d float64 tensors on the CPU that begin with the
exponent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fxpath import ops

__all__ = ["LIMIT", "lift_into"]

_LIBRARY = torch.library.Library("fxpath", "FRAGMENT")

#: Entries of a weight that are lifted and used at once: 4 MB of float32 stay in the cache.
BLOCK = 1 << 20

#: Columns below which a product is taken with its operands transposed, which BLAS does faster.
NARROW = 16

#: Exponents of the largest entry that are left as they are: a step saved.
SLACK = 24

#: Exponent of a tensor of zeros, which fits any scale.
VOID = -(10**9)

#: Exponents that one power of two can undo in each number format.
LIMIT = {torch.float32: 120, torch.float64: 1000}

Kernel = Callable[..., Any]


def _operator(schema: str, fake: Kernel) -> Callable[[Kernel], Kernel]:
    """Define ``torch.ops.fxpath.<name>``; ``fake`` says what comes out, without computing it."""
    name = schema.split("(")[0]

    def define(kernel: Kernel) -> Kernel:
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fxpath::{name}", fake, lib=_LIBRARY)
        return kernel

    return define


def _host(value: float | list[float]) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _scalar() -> Tensor:
    return torch.empty((), dtype=torch.float64)


# -- weights ---------------------------------------------------------------------------------------


def lift_into(out: Tensor, value: Tensor, q: float) -> Tensor:
    """Write ``|value| ** q`` into ``out``, in the number format of ``out``; 0 ** 0 = 0."""
    if q == 0:
        return out.copy_(value != 0)
    if value.dtype == out.dtype:
        torch.abs(value, out=out)
    else:
        out.copy_(value).abs_()
    return out if q == 1 else out.pow_(q)


@_operator(
    "lifted(Tensor value, ScalarType dtype, float q) -> Tensor",
    lambda value, dtype, q: value.new_empty(value.shape, dtype=dtype),
)
def lifted(value: Tensor, dtype: torch.dtype, q: float) -> Tensor:
    """``|value| ** q``."""
    return lift_into(value.new_empty(value.shape, dtype=dtype), value, q)


@_operator("lift_(Tensor(a!) out, Tensor value, float q) -> ()", lambda out, value, q: None)
def lift_(out: Tensor, value: Tensor, q: float) -> None:
    """``|value| ** q`` in the caller's memory."""
    lift_into(out, value, q)


@_operator("times_(Tensor(a!) out, Tensor other) -> ()", lambda out, other: None)
def times_(out: Tensor, other: Tensor) -> None:
    """``out *= other``."""
    out.mul_(other)


@_operator("plus_(Tensor(a!) out, Tensor a, Tensor b) -> ()", lambda out, a, b: None)
def plus_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out += a * b``."""
    out.addcmul_(a, b)


@_operator("clear_(Tensor(a!) out) -> ()", lambda out: None)
def clear_(out: Tensor) -> None:
    """``out = 0``."""
    out.zero_()


@_operator(
    "filled(int[] shape, float value, ScalarType dtype, Device device) -> Tensor",
    lambda shape, value, dtype, device: torch.empty(shape, dtype=dtype, device=device),
)
def filled(
    shape: Sequence[int], value: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """One number everywhere."""
    return torch.full(shape, value, dtype=dtype, device=device)


@_operator(
    "normalizer(Tensor? gamma, Tensor var, float eps) -> Tensor",
    lambda gamma, var, eps: var.new_empty(var.shape, dtype=torch.float64),
)
def normalizer(gamma: Tensor | None, var: Tensor, eps: float) -> Tensor:
    """See :func:`fxpath.ops.normalizer`."""
    return ops.normalizer(gamma, var, eps)


@_operator(
    "folded_bias(Tensor? bias, Tensor factor, Tensor? beta, Tensor mean) -> Tensor",
    lambda bias, factor, beta, mean: torch.empty_like(factor),
)
def folded_bias(bias: Tensor | None, factor: Tensor, beta: Tensor | None, mean: Tensor) -> Tensor:
    """See :func:`fxpath.ops.folded_bias`."""
    return ops.folded_bias(bias, factor, beta, mean)


# -- scales ----------------------------------------------------------------------------------------


def _fake_settle(
    values: Sequence[Tensor], scales: Sequence[Tensor], weight: Tensor | None, dim: int | None
) -> tuple[Tensor, Tensor]:
    shape = list(torch.broadcast_shapes(*(v.shape for v in values)) if dim is None else ())
    if dim is not None:
        shape = list(values[0].shape)
        shape[dim] = sum(v.shape[dim] for v in values)
    return values[0].new_empty(shape), torch.empty(2 + len(values), dtype=torch.float64)


@_operator(
    "settle(Tensor[] values, Tensor[] scales, Tensor? weight, int? dim) -> (Tensor, Tensor)",
    _fake_settle,
)
def settle(
    values: Sequence[Tensor], scales: Sequence[Tensor], weight: Tensor | None, dim: int | None
) -> tuple[Tensor, Tensor]:
    """Bring tensors to a common scale and add them (or join them along ``dim``).

    Args:
        values: mantissas.
        scales: for each of them a tensor that begins with its exponent.
        weight: multiplied with the first of them, if given.
        dim: axis to join along.

    Returns:
        The result with its largest entry near 1, and its scale: a 1-d tensor of the exponent, the
        smallest entry before scaling in units of the coarsest rounding that went into it, and the
        factor that each tensor was multiplied by.
    """
    limit = LIMIT[values[0].dtype]
    powers = [int(scale[0]) for scale in scales]
    tops = [_top(v, scale) for v, scale in zip(values, scales, strict=True)]
    common = max(tops)
    factors = [2.0 ** max(-2 * limit, min(limit, power - common)) for power in powers]
    coarsest = max(1.0, *factors)
    if weight is None:
        terms = [_times(v, f) for v, f in zip(values, factors, strict=True)]
    else:
        first = _times(weight, factors[0])
        coarsest = max(coarsest, float(first.amax()) if first.numel() else 1.0)
        rest = zip(values[1:], factors[1:], strict=True)
        terms = [values[0] * first, *(_times(v, f) for v, f in rest)]
    joined = _join(terms, dim)
    low, high = (float(bound) for bound in torch.aminmax(joined)) if joined.numel() else (1.0, 1.0)
    step = _exponent(high, limit)
    if abs(step) > SLACK:
        joined = joined * 2.0**-step
        factors = [f * 2.0**-step for f in factors]
    elif joined is values[0]:
        step, joined = 0, joined.clone()  # an operator must not return its argument
    else:
        step = 0
    return joined, _host([common + step if high else VOID, low / coarsest, *factors])


def _top(value: Tensor, scale: Tensor) -> int:
    """Exponent of the largest entry, up to :data:`SLACK`; for constants, whose scale is 0, exact."""
    if len(scale) > 1:
        return int(scale[0])
    largest = float(value.amax()) if value.numel() else 0.0
    return math.frexp(largest)[1] if largest else VOID


def _times(value: Tensor, factor: float) -> Tensor:
    return value if factor == 1 else value * factor


def _join(terms: list[Tensor], dim: int | None) -> Tensor:
    if dim is not None:
        return torch.cat(terms, dim)
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _exponent(value: float, limit: int) -> int:
    return max(-limit, min(limit, math.frexp(value)[1]))


@_operator(
    "settle_backward(Tensor grad, Tensor scale, Tensor[] values, Tensor? weight, int? dim)"
    " -> Tensor[]",
    lambda grad, scale, values, weight, dim: [*map(torch.empty_like, values), _scalar()],
)
def settle_backward(
    grad: Tensor,
    scale: Tensor,
    values: Sequence[Tensor],
    weight: Tensor | None,
    dim: int | None,
) -> list[Tensor]:
    """Gradients of the terms of :func:`settle`, and the largest of their sums."""
    factors: list[float] = scale[2:].tolist()
    if dim is not None:
        pieces = list(grad.split([v.shape[dim] for v in values], dim))
    else:
        pieces = [grad] * len(values)
    # An operator must not return its argument, nor the same tensor twice.
    pieces = [p * f for p, f in zip(pieces, factors, strict=True)]
    if weight is not None:
        pieces[0].mul_(weight)
    mass = max((float(p.sum()) for p in pieces), default=0.0)
    return [*map(_sum_to, pieces, values), _host(mass)]


def _sum_to(value: Tensor, like: Tensor) -> Tensor:
    return value.sum_to_size(like.shape) if value.shape != like.shape else value


@_operator(
    "total(Tensor[] values, Tensor[] scales) -> (Tensor, Tensor)",
    lambda values, scales: (_scalar(), torch.empty(2 + len(values), dtype=torch.float64)),
)
def total(values: Sequence[Tensor], scales: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sum of all entries: its mantissa, and its scale as in :func:`settle`."""
    limit = LIMIT[torch.float64]
    sums = [float(v.sum(dtype=torch.float64)) for v in values]
    powers = [int(scale[0]) for scale in scales]
    tops = [e + _exponent(s, limit) for s, e in zip(sums, powers, strict=True) if s != 0]
    common = max(tops, default=0)
    factors = [2.0 ** max(-2 * limit, e - common) for e in powers]
    mantissa = sum(s * f for s, f in zip(sums, factors, strict=True))
    return _host(mantissa), _host([common, 0.0, *factors])


@_operator(
    "total_backward(Tensor grad, Tensor scale, Tensor[] values) -> Tensor[]",
    lambda grad, scale, values: list(map(torch.empty_like, values)),
)
def total_backward(grad: Tensor, scale: Tensor, values: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the terms of :func:`total`."""
    outer, factors = float(grad), scale[2:].tolist()
    return [torch.full_like(v, outer * f) for v, f in zip(values, factors, strict=True)]


@_operator("inverse(Tensor value) -> Tensor", lambda value: torch.empty_like(value))
def inverse(value: Tensor) -> Tensor:
    """``1 / value``, and 0 for 0: the derivative of log ||Phi||, where there are paths."""
    return torch.where(value == 0, value, 1 / value)


@_operator("least(Tensor[] scales) -> Tensor", lambda scales: _scalar())
def least(scales: Sequence[Tensor]) -> Tensor:
    """Smallest entry of any tensor before scaling, inf for none; NaN if there is one."""
    return torch.stack([scale[1] for scale in scales]).amin() if scales else _host(math.inf)


@_operator("most(Tensor[] values) -> Tensor", lambda values: _scalar())
def most(values: Sequence[Tensor]) -> Tensor:
    """Maximum of 0-d tensors, 0 for none; NaN if one of them is."""
    return torch.stack(list(values)).amax() if values else _host(0.0)


# -- maps along axes -------------------------------------------------------------------------------


def _fake_mix(x: Tensor, dim: int, matrix: Tensor) -> Tensor:
    shape = list(x.shape)
    shape[dim] = matrix.shape[0]
    return x.new_empty(shape)


@_operator("mix(Tensor x, int dim, Tensor matrix) -> Tensor", _fake_mix)
def mix(x: Tensor, dim: int, matrix: Tensor) -> Tensor:
    """See :func:`fxpath.ops.mix`."""
    return ops.mix(x, dim, matrix).contiguous()


@_operator(
    "scaled(Tensor x, Tensor weight) -> Tensor",
    lambda x, weight: x.new_empty(torch.broadcast_shapes(x.shape, weight.shape)),
)
def scaled(x: Tensor, weight: Tensor) -> Tensor:
    """``x * weight`` with broadcasting."""
    return x * weight


@_operator(
    "scaled_backward(Tensor grad, Tensor x, Tensor other) -> Tensor",
    lambda grad, x, other: torch.empty_like(x),
)
def scaled_backward(grad: Tensor, x: Tensor, other: Tensor) -> Tensor:
    """Gradient of either factor of :func:`scaled`, the first one here."""
    product = _sum_to(grad * other, x)
    # An operator must not return its argument.
    return product.clone() if product is grad else product


# -- weighted sums ---------------------------------------------------------------------------------


def _blocks(weight: Tensor) -> Iterator[slice]:
    """Blocks of rows that stay in the cache of a CPU; elsewhere all at once."""
    rows, columns = weight.shape
    step = max(1, BLOCK // max(1, columns)) if weight.device.type == "cpu" else max(1, rows)
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def _scratch(weight: Tensor, like: Tensor) -> Tensor:
    """Memory for the largest block of a weight."""
    sizes = [(rows.stop - rows.start) * weight.shape[1] for rows in _blocks(weight)]
    return like.new_empty(max(sizes, default=0))


def _forward(weight: Tensor, columns: Tensor, q: float) -> Tensor:
    """``|weight| ** q @ columns``, block by block.

    Shapes ``[outputs, inputs]`` and ``[inputs, positions]``.
    """
    y = columns.new_empty(weight.shape[0], columns.shape[1])
    scratch = _scratch(weight, columns)
    narrow = columns.T.contiguous() if columns.shape[1] < NARROW else None
    for rows in _blocks(weight):
        part = weight[rows]
        block = lift_into(scratch[: part.numel()].view(part.shape), part, q)
        if narrow is None:
            torch.mm(block, columns, out=y[rows])
        elif len(narrow) == 1:
            torch.mv(block, narrow[0], out=y[rows, 0])
        else:
            y[rows] = torch.mm(narrow, block.T).T
    return y


def _backward(
    grad: Tensor, columns: Tensor, weight: Tensor, out: Tensor, q: float, needed: bool
) -> Tensor:
    """Gradient of the columns (empty unless needed), and in ``out`` the scores of the weight.

    Shapes ``[outputs, positions]``, ``[inputs, positions]`` and twice ``[outputs, inputs]``.
    """
    narrow = columns.shape[1] < NARROW
    result = columns.new_zeros(columns.T.shape if narrow else columns.shape)
    scratch = _scratch(weight, columns)
    for rows in _blocks(weight):
        g, block = grad[rows], lift_into(out[rows], weight[rows], q)
        if not needed:
            pass
        elif len(result) == 1 and narrow:
            result[0].addmv_(block.T, g[:, 0])
        else:
            result.addmm_(*((g.T, block) if narrow else (block.T, g)))
        if columns.shape[1] == 1:
            block.mul_(g).mul_(columns[:, 0])
        else:
            product = scratch[: block.numel()].view(block.shape)
            block.mul_(torch.mm(g, columns.T, out=product))
    return result.T.contiguous() if narrow else result


def _fake_dense(x: Tensor, weight: Tensor, q: float) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@_operator("dense(Tensor x, Tensor weight, float q) -> Tensor", _fake_dense)
def dense(x: Tensor, weight: Tensor, q: float) -> Tensor:
    """``x @ (|weight| ** q).T``; shapes ``[..., in]`` and ``[out, in]``."""
    y = _forward(weight, x.reshape(-1, x.shape[-1]).T, q)
    return y.T.reshape(*x.shape[:-1], weight.shape[0]).contiguous()


@_operator(
    "dense_backward(Tensor grad, Tensor x, Tensor weight, Tensor(a!) out, float q, bool needed)"
    " -> Tensor",
    lambda grad, x, weight, out, q, needed: torch.empty_like(x),
)
def dense_backward(
    grad: Tensor, x: Tensor, weight: Tensor, out: Tensor, q: float, needed: bool
) -> Tensor:
    """Gradient of ``x``; the scores of ``weight`` go to ``out``."""
    flat = grad.reshape(-1, grad.shape[-1])
    gradient = _backward(flat.T, x.reshape(-1, x.shape[-1]).T, weight, out, q, needed)
    return gradient.T.reshape(x.shape).contiguous()


def _outputs(x: Tensor, weight: Tensor, matrices: Sequence[Tensor | None]) -> list[int]:
    extents = [n if m is None else m.shape[1] for n, m in zip(x.shape[2:], matrices, strict=True)]
    return [x.shape[0], weight.shape[0], *extents]


def _fake_window(
    x: Tensor, weight: Tensor, matrices: Sequence[Tensor | None], groups: int, q: float
) -> tuple[Tensor, Tensor]:
    shape = _outputs(x, weight, matrices)
    taps = math.prod(weight.shape[2:])
    columns = x.new_empty(x.shape[1] * taps, x.shape[0] * math.prod(shape[2:]))
    return x.new_empty(shape), columns


@_operator(
    "window(Tensor x, Tensor weight, Tensor?[] matrices, int groups, float q) -> (Tensor, Tensor)",
    _fake_window,
)
def window(
    x: Tensor, weight: Tensor, matrices: Sequence[Tensor | None], groups: int, q: float
) -> tuple[Tensor, Tensor]:
    """See :func:`fxpath.ops.window`, with ``|weight| ** q`` for the weight; and the columns."""
    columns = ops.columns(x, matrices)
    if all(matrix is None for matrix in matrices):
        columns = columns.clone()  # an operator must not return its argument
    flat = weight.reshape(weight.shape[0], -1)
    if groups == 1:
        y = _forward(flat, columns, q)
    else:
        lifted = lift_into(columns.new_empty(flat.shape), flat, q)
        y = ops.grouped(lifted, columns, groups)
    _, outputs, *extents = _outputs(x, weight, matrices)
    return y.reshape(outputs, len(x), *extents).transpose(0, 1).contiguous(), columns


@_operator(
    "window_backward(Tensor grad, Tensor columns, Tensor weight, Tensor(a!) out,"
    " Tensor?[] matrices, int[] shape, int groups, float q, bool needed) -> Tensor",
    lambda grad, columns, weight, out, matrices, shape, *_: grad.new_empty(shape),
)
def window_backward(
    grad: Tensor,
    columns: Tensor,
    weight: Tensor,
    out: Tensor,
    matrices: Sequence[Tensor | None],
    shape: Sequence[int],
    groups: int,
    q: float,
    needed: bool,
) -> Tensor:
    """Gradient of the argument, of the given shape; the scores of ``weight`` go to ``out``."""
    g = grad.transpose(0, 1).reshape(grad.shape[1], -1)
    flat, scores = weight.reshape(len(weight), -1), out.view(len(weight), -1)
    if groups == 1:
        gradient = _backward(g, columns, flat, scores, q, needed)
    else:
        split = g.reshape(groups, -1, g.shape[1])
        lifted = lift_into(scores, flat, q).view(groups, -1, flat.shape[1])
        gradient = torch.bmm(lifted.transpose(1, 2), split).reshape(columns.shape)
        lifted.mul_(torch.bmm(split, columns.reshape(groups, -1, g.shape[1]).transpose(1, 2)))
    if not needed:
        return grad.new_zeros(shape)
    return ops.uncolumns(gradient, shape, matrices).contiguous()
