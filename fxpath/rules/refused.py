"""Why the best-known operations outside the theory are refused, and what a user can do."""

from __future__ import annotations

from fxpath.rules.registry import Refusal

CUT = 'analyse the network up to the module before it with until="..."'

SMOOTH = (
    "a smooth activation is not positively homogeneous, so no path-lifting exists",
    f"replace it by ReLU, or {CUT}",
)
NORMALIZING = (
    "it normalizes by statistics of the activations themselves, which is not piecewise linear",
    "use BatchNorm in eval mode, whose statistics are frozen",
)
PRODUCT = (
    "attention multiplies activations with each other",
    f"no path-lifting covers attention; {CUT}",
)
TRAINING = (
    "it is hard-coded to training mode, where its output is random or depends on the batch",
    "make the model obey model.eval() (training=self.training)",
)
ORDER = (
    "it returns positions or an order instead of activations",
    f"return the values themselves, or {CUT}",
)
RANDOM = ("its result is random", "remove the noise in eval mode")

EXPLAINED: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        [
            *("sigmoid", "log_sigmoid", "tanh", "gelu", "silu", "elu", "selu", "celu", "mish"),
            *("softplus", "hardsigmoid", "hardswish", "softsign", "exp", "log", "sqrt", "rsqrt"),
            *("erf", "sin", "cos", "pow", "square", "hardshrink", "softshrink", "glu"),
        ],
        SMOOTH,
    ),
    **dict.fromkeys(["softmax", "log_softmax", "_softmax", "_log_softmax"], (SMOOTH[0], CUT)),
    **dict.fromkeys(
        [
            *("layer_norm", "native_layer_norm", "group_norm", "native_group_norm", "rms_norm"),
            *("instance_norm", "local_response_norm", "linalg_vector_norm", "norm", "var", "std"),
        ],
        NORMALIZING,
    ),
    **dict.fromkeys(
        [
            *("scaled_dot_product_attention", "_native_multi_head_attention"),
            "_transformer_encoder_layer_fwd",
        ],
        PRODUCT,
    ),
    **dict.fromkeys(["argmax", "argmin", "sort", "topk", "argsort"], ORDER),
    **dict.fromkeys(
        ["upsample_bicubic2d", "_upsample_bicubic2d_aa"],
        ("bicubic interpolation has negative coefficients", "use bilinear or nearest upsampling"),
    ),
    "embedding": (
        "it looks entries up by integer inputs, which is not a function of real inputs",
        "analyse the network from the embedded vectors on",
    ),
}


def refusal(operation: str) -> Refusal:
    """Explain why an operation without a rule is refused.

    ``operation`` is the ATen name without overload, e.g. ``softmax``.
    """
    known = EXPLAINED.get(operation) or EXPLAINED.get(operation.removesuffix("_"))
    if known is not None:
        return Refusal(*known)
    return Refusal(
        "there is no rule for this operation",
        "express it by supported operations, or analyse the network up to the module before it "
        'with until="..."; a rule of its own is one function under fxpath/rules/',
    )
