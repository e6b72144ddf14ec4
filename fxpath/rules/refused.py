"""Why the best-known operations outside the theory are refused, and what a user can do."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxpath.graph.refusal import RANDOM, READ_OUT, Refusal
from fxpath.private import OpOverload, schema

Reason = tuple[str, str]

CUT = 'analyse the network up to the module before it with until="..."'

SMOOTH = (
    "a smooth activation is not positively homogeneous, so no path-lifting exists",
    f"replace it by ReLU, or {CUT}",
)
CURVED = (
    "it is not piecewise linear in its input, so no path-lifting exists",
    f"use ReLU, absolute values and maxima instead, or {CUT}",
)
GATED = (
    "it multiplies an activation with a function of an activation",
    f"replace it by ReLU, or {CUT}",
)
SHRINKING = (
    "it is piecewise linear, but no ReLU or k-max-pooling neuron",
    "write x - x.clamp(-lambd, lambd), which is the same function",
)
NORMALIZING = (
    "it normalizes by statistics of the activations themselves, which is not piecewise linear",
    "use BatchNorm in eval mode, whose statistics are frozen",
)
OWN_STATISTICS = (
    "it normalizes by statistics of the activations themselves, which is not piecewise linear",
    "use track_running_stats=True and eval mode, where the statistics are frozen, or BatchNorm",
)
SPREAD = (
    "a variance multiplies activations with each other, which is not piecewise linear",
    f"use frozen statistics, or {CUT}",
)
PRODUCT = (
    "it multiplies activations with each other, which is not piecewise linear in them",
    f"keep one factor constant, or {CUT}",
)
ATTENTION = (
    "attention multiplies activations with each other",
    f"no path-lifting covers attention; {CUT}",
)
DISTANCES = (
    "distances of all pairs have no rule, and are piecewise linear for p=1 alone",
    "write (a[:, None] - b[None]).abs().sum(-1) for the 1-norm",
)
GATES = (
    "its gates are tanh and sigmoid, which are not piecewise linear",
    f"use nn.RNN(nonlinearity='relu'), or {CUT}",
)
TRAINING = (
    "it is hard-coded to training mode, where its output is random or depends on the batch",
    "make the model obey model.eval() (training=self.training)",
)
ORDER = (
    "it returns positions or an order instead of activations",
    f"return the values themselves, or {CUT}",
)
BOOLEAN = (
    "a comparison or test of activations gives booleans, which jump",
    "use maximum, minimum, clamp or ReLU instead of a condition",
)
JUMPING = (
    "it jumps, so it is not continuous",
    f"use ReLU, clamp or hardtanh instead, or {CUT}",
)
COUNTING = (
    "it returns integers, which jump",
    f"leave it out, or {CUT}",
)
DISTINCT = (
    "how many entries it returns depends on which activations are equal",
    f"use sort, which keeps all entries, or {CUT}",
)
SOLVING = (
    "it solves linear equations, which is linear in the right-hand side alone",
    f"multiply with the inverse of a constant matrix, kept in a buffer, or {CUT}",
)
COMPLEX = (
    "complex numbers have no path-lifting",
    "write the map as a real matrix, or as two maps for real and imaginary part",
)
NOT_REAL = (
    "it reads the bytes of activations as another number format",
    "convert with .to(dtype) instead",
)
UNPOOLING = (
    "it puts values to positions that depend on activations, which may jump",
    "use interpolation or a transposed convolution",
)

EXPLAINED: dict[str, Reason] = {
    **dict.fromkeys(
        ["sigmoid", "log_sigmoid", "tanh", "gelu", "silu", "mish", "softplus", "tanhshrink"], SMOOTH
    ),
    **dict.fromkeys(
        ["elu", "selu", "celu"],
        ("it is exponential below zero, which is not positively homogeneous", SMOOTH[1]),
    ),
    **dict.fromkeys(["softmax", "log_softmax", "_softmax", "_log_softmax"], (SMOOTH[0], CUT)),
    **dict.fromkeys(["softmin", "gumbel_softmax"], (SMOOTH[0], CUT)),
    **dict.fromkeys(
        [
            *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "erf"),
            *("erfc", "erfinv", "sin", "cos", "tan", "sinh", "cosh", "asin", "acos", "atan"),
            *("asinh", "acosh", "atanh", "atan2", "arctan", "arctan2", "sinc", "logit", "softsign"),
            *("logsumexp", "logaddexp", "logaddexp2", "logcumsumexp", "special_expit", "hypot"),
            "pow",
            *("lgamma", "digamma", "reciprocal", "float_power", "xlogy", "mse_loss", "huber_loss"),
            *("smooth_l1_loss", "cross_entropy_loss"),
            *("binary_cross_entropy", "binary_cross_entropy_with_logits", "linalg_inv", "inverse"),
            *("linalg_det", "det", "linalg_svd", "linalg_norm", "linalg_matrix_norm", "frexp"),
            *("linalg_cholesky", "matrix_exp", "linalg_matrix_exp", "nuclear_norm"),
            *("frobenius_norm", "linalg_eigh", "linalg_qr", "linalg_pinv", "trilinear"),
        ],
        CURVED,
    ),
    **dict.fromkeys(["hardswish", "glu", "swish"], GATED),
    "softshrink": SHRINKING,
    **dict.fromkeys(
        [
            *("layer_norm", "native_layer_norm", "group_norm", "native_group_norm", "rms_norm"),
            *("local_response_norm", "cosine_similarity", "renorm", "_fused_rms_norm"),
        ],
        NORMALIZING,
    ),
    **dict.fromkeys(["var", "std", "var_mean", "std_mean", "cov", "corrcoef"], SPREAD),
    **dict.fromkeys(
        [
            *("prod", "cumprod", "square", "cross", "linalg_cross", "matrix_power"),
            *("linalg_matrix_power", "vander", "linalg_vander"),
        ],
        PRODUCT,
    ),
    **dict.fromkeys(
        [
            *("scaled_dot_product_attention", "_native_multi_head_attention"),
            *("_transformer_encoder_layer_fwd", "multi_head_attention_forward"),
            *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math"),
        ],
        ATTENTION,
    ),
    **dict.fromkeys(["cdist", "_cdist_forward", "pdist"], DISTANCES),
    **dict.fromkeys(
        ["rnn_tanh", "rnn_tanh_cell", "lstm", "lstm_cell", "gru", "gru_cell", "quantized_lstm"],
        GATES,
    ),
    **dict.fromkeys(["argmax", "argmin", "argsort", "nonzero", "nonzero_static"], ORDER),
    **dict.fromkeys(
        [
            *("gt", "ge", "lt", "le", "eq", "ne", "greater", "greater_equal", "less", "less_equal"),
            *("equal", "not_equal", "isclose", "allclose", "isfinite", "isinf", "isnan", "isreal"),
            *("logical_and", "logical_or", "logical_not", "logical_xor", "signbit", "any", "all"),
            *("isposinf", "isneginf", "isin", "bitwise_and", "bitwise_or", "bitwise_not"),
        ],
        BOOLEAN,
    ),
    **dict.fromkeys(
        [
            *("sign", "sgn", "heaviside", "round", "floor", "ceil", "trunc", "fix", "frac"),
            *("copysign", "fmod", "remainder", "floor_divide", "hardshrink", "mode", "nextafter"),
            *("fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine"),
            *("quantize_per_tensor", "quantize_per_channel"),
        ],
        JUMPING,
    ),
    **dict.fromkeys(
        [
            *("count_nonzero", "bucketize", "searchsorted", "histc", "bincount", "one_hot"),
            "histogram",
        ],
        COUNTING,
    ),
    **dict.fromkeys(
        [
            *("view_as_real", "view_as_complex", "real", "imag", "complex", "polar", "angle"),
            *("stft", "istft", "conj", "_conj", "resolve_conj"),
        ],
        COMPLEX,
    ),
    **dict.fromkeys(["unique", "_unique2", "unique_consecutive", "unique_dim"], DISTINCT),
    **dict.fromkeys(["linalg_solve", "linalg_solve_triangular", "cholesky_solve"], SOLVING),
    **dict.fromkeys(["_local_scalar_dense", "item", "is_nonzero"], READ_OUT),
    **dict.fromkeys(["max_unpool2d", "max_unpool3d"], UNPOOLING),
    **dict.fromkeys(["fractional_max_pool2d", "fractional_max_pool3d"], RANDOM),
}

UNKNOWN = (
    "there is no rule for this operation",
    "say by fxpath.register_rule which supported operations it is composed of, write it as these, "
    'or analyse the network up to the module before it with until="..."',
)


def refusal(node: fx.Node) -> Refusal:
    """Explain why an operation without a rule is refused."""
    called: Any = node.target
    name = schema(called).name.split("::")[1] if isinstance(called, OpOverload) else str(called)
    known = EXPLAINED.get(name) or EXPLAINED.get(name.removesuffix("_"))
    if known is not None:
        return Refusal(*known)
    if torch.Tag.nondeterministic_seeded in getattr(called, "tags", ()):
        return Refusal(*RANDOM)
    if name.startswith(("fft_", "_fft")):
        return Refusal(*COMPLEX)
    return Refusal(*UNKNOWN)
