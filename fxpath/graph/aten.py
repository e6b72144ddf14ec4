"""Sets of ATen overloads that are known for one trait, and the words of lifted graphs among them.

What each operation means for path-norms stands in :mod:`fxpath.rules`; here stands what other
passes ask of operations: which are convolutions, which only show a tensor in another way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxpath.private import OpOverload, overload_name, schema

aten = torch.ops.aten

# -- words of lifted graphs: they only move entries, of activations and weights alike --------------

CAT = aten.cat.default
CAST = aten.to.dtype
EXPAND = aten.expand.default
PERMUTE = aten.permute.default
RESHAPE = aten.reshape.default
SLICE = aten.slice.Tensor
#: Selections with a layout of their own.
SELECTIONS: set[Any] = {
    aten.diagonal.default,
    aten.unfold.default,
    aten.im2col.default,
    aten.tril.default,
    aten.triu.default,
}
#: All of them.
MOVES: set[Any] = {CAT, EXPAND, PERMUTE, RESHAPE, SLICE, *SELECTIONS}

#: The transposes of those that select entries: ``(gradient, shape, *arguments)``.
SELECTION_BACKWARD: dict[Any, Callable[..., Tensor]] = {
    SLICE: aten.slice_backward.default,
    aten.select.int: aten.select_backward.default,
    aten.flip.default: lambda grad, shape, dims: aten.flip(grad, dims),
    aten.diagonal.default: aten.diagonal_backward.default,
    aten.unfold.default: aten.unfold_backward.default,
    aten.im2col.default: lambda grad, shape, *spec: aten.col2im(grad, shape[-2:], *spec),
    aten.tril.default: lambda grad, shape, k: aten.tril(grad, k),
    aten.triu.default: lambda grad, shape, k: aten.triu(grad, k),
}

# -- what is computed ------------------------------------------------------------------------------

ADD = aten.add.Tensor
LINEAR = aten.linear.default
MULTIPLY = aten.mul.Tensor
ZEROS = aten.zeros.default
METADATA = aten._assert_tensor_metadata.default
INDEX_ADD = aten.index_add.default

CONVOLUTION = aten.convolution.default
CONVOLUTION_BACKWARD = aten.convolution_backward.default
CONVOLUTIONS: set[Any] = {
    *(getattr(aten, f"conv{n}d").default for n in (1, 2, 3)),
    *(getattr(aten, f"conv{n}d").padding for n in (1, 2, 3)),
    CONVOLUTION,
}
TRANSPOSED: set[Any] = {
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
}

#: Batch norms that return their statistics as well.
WITH_STATISTICS: set[Any] = {aten._native_batch_norm_legit_no_training.default}
INSTANCE_NORM = aten.instance_norm.default
#: With frozen statistics an instance norm is the same map.
BATCH_NORMS: set[Any] = {aten.batch_norm.default, INSTANCE_NORM, *WITH_STATISTICS}

#: Maxima over windows -> their number of axes.
MAX_POOLS: dict[Any, int] = {
    aten.max_pool1d.default: 1,
    aten.max_pool2d.default: 2,
    aten.max_pool3d.default: 3,
}
MAX_POOLS_WITH_INDICES: dict[Any, int] = {
    aten.max_pool1d_with_indices.default: 1,
    aten.max_pool2d_with_indices.default: 2,
    aten.max_pool3d_with_indices.default: 3,
}

# -- what hands its argument on --------------------------------------------------------------------

DROPOUTS: set[Any] = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
}
CASTS: set[Any] = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default}
RESHAPES: set[Any] = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}

#: The same memory.
ALIASES: set[Any] = {aten.alias.default, aten.detach.default}

#: Operations that show a parameter as it is; ``detach`` would cut the scores off.
SAME: set[Any] = {aten.contiguous.default, aten.clone.default, *ALIASES}

#: Another shape for the same entries in the same order, repeated or not.
IN_ORDER: set[Any] = {*RESHAPES, aten.unsqueeze.default, EXPAND}

#: Operations on a parameter that only show its entries in another order or shape: the coordinates
#: stay the parameter's own.
RELABELLING: set[Any] = {
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.select.int,
    aten.slice.Tensor,
    aten.expand.default,
    aten.numpy_T.default,
    aten.mT.default,
    aten.movedim.int,
    aten.swapaxes.default,
    aten.flip.default,
}

#: Operations that pick entries of a parameter by a constant list of positions.
PICKING: set[Any] = {aten.index.Tensor, aten.index_select.default, aten.embedding.default}

#: Operations whose pieces are entries of the parameter that they split.
SPLITTING: set[Any] = {
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
}

#: Weights are lifted by value: what a view needs to know of memory may not hold for them.
BY_VALUE: dict[Any, Any] = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
}

#: Operations that may return their argument itself although their schema does not say so.
MAY_ALIAS: set[Any] = {*DROPOUTS, aten.rrelu.default}

# -- where numbers come from -----------------------------------------------------------------------

#: Tensors made from the shape of another one: the fill value, or the argument that holds it.
MADE_FROM_SHAPE: dict[Any, float | str] = {
    aten.zeros_like.default: 0.0,
    aten.ones_like.default: 1.0,
    aten.new_zeros.default: 0.0,
    aten.new_ones.default: 1.0,
    aten.zero.default: 0.0,
    aten.full_like.default: "fill_value",
    aten.new_full.default: "fill_value",
    aten.fill.Scalar: "value",
    aten.fill.Tensor: "value",
}

#: Tensors whose memory nobody has written to.
UNWRITTEN: set[Any] = {
    *(aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default),
    *(aten.empty_strided.default, aten.empty_permuted.default, aten.new_empty_strided.default),
}

# -- traits of all overloads of an operation -------------------------------------------------------

#: Random in training mode only, or by another argument: rules say more about these.
SOMETIMES_RANDOM: set[Any] = {
    *(aten.dropout, aten.feature_dropout, aten.alpha_dropout, aten.feature_alpha_dropout),
    *(aten.native_dropout, aten.rrelu, aten.rrelu_with_noise, aten.scaled_dot_product_attention),
    *(aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_efficient_attention),
    *(aten.rnn_relu, aten.rnn_tanh, aten.lstm, aten.gru),
}

#: Operations whose tensors have one number format.
ONE_FORMAT: set[Any] = {
    *(aten.linear, aten.matmul, aten.mm, aten.bmm, aten.mv, aten.addmm, aten.addmv, aten.baddbmm),
    *(aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution, aten.conv_transpose1d),
    *(aten.conv_transpose2d, aten.conv_transpose3d, aten.einsum),
}

#: Operations that hold no size of their inputs.
SIZELESS: set[Any] = {
    *(aten.linear, aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution, aten.batch_norm),
    *(aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d),
    *(aten.relu, aten.relu_, aten.relu6, aten.leaky_relu, aten.leaky_relu_, aten.prelu),
    *(aten.hardtanh, aten.hardtanh_, aten.dropout, aten.dropout_, aten.feature_dropout),
    *(aten.max_pool1d, aten.max_pool2d, aten.max_pool3d, aten.avg_pool1d, aten.avg_pool2d),
    *(aten.avg_pool3d, aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d),
    *(aten.adaptive_avg_pool3d, aten.adaptive_max_pool1d, aten.adaptive_max_pool2d),
    *(aten.add, aten.add_, aten.sub, aten.mul, aten.neg, aten.cat, aten.flatten, aten.mean),
    *(aten.sum, aten.amax, aten.permute, aten.transpose, aten.contiguous, aten.detach),
}


def functional(overload: OpOverload) -> OpOverload | None:
    """``aten.relu_.default`` -> ``aten.relu.default``, if there is such an overload."""
    namespace, name = schema(overload).name.split("::")
    if namespace != "aten" or not name.endswith("_"):
        return None
    packet = getattr(aten, name[:-1], None)
    return getattr(packet, overload_name(overload), None) if packet is not None else None
