"""Every torchvision model: right to the tolerances, or refused with all its obstacles named."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import convnext, efficientnet, maxvit, mobilenetv3
from torchvision.models import swin_transformer as swin

import fxpath
from fxpath.passes import rewrite, take_in
from fxpath.program import program
from tests.oracles.reference import reference
from tests.support.zoo import INPUTS, SMALL, build, build_hollow, module_types, refused

NORM_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}
SCORE_TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-8}
BLOCK = 1 << 18

# One of each kind of block; the path-norm alone is compared for all 51.
SCORED = {
    *("alexnet", "vgg_bn", "resnet18", "resnext50_32x4d", "densenet121", "googlenet"),
    *("inception_v3", "mnasnet0_5", "mobilenet_v2", "regnet_x_400mf", "shufflenet_v2_x1_0"),
    *("squeezenet1_0", "r2plus1d_18", "deeplabv3_resnet50"),
}

# Of the others, those whose blocks and rules another one of the family has as well.
SIBLINGS = {
    *("vgg11", "vgg13", "vgg16", "vgg11_bn", "vgg13_bn", "vgg16_bn", "resnet34", "resnet50"),
    *("resnet101", "resnext101_32x8d", "wide_resnet50_2", "densenet161", "densenet169"),
    *("mnasnet0_75", "mnasnet1_0", "regnet_x_800mf", "regnet_x_1_6gf", "regnet_x_3_2gf"),
    *("regnet_x_8gf", "regnet_x_16gf", "shufflenet_v2_x0_5", "shufflenet_v2_x1_5"),
    *("fcn_resnet50", "fcn_resnet101", "deeplabv3_resnet101", "densenet201", "resnet152"),
    *("resnext101_64x4d", "wide_resnet101_2", "regnet_x_32gf", "vgg19"),
}


def assert_close_norm(actual: float, expected: float, rtol: float) -> None:
    """Raise unless two norms agree relatively; what is zero, infinite or NaN never passes."""
    assert 0 < expected < float("inf")
    error = abs(actual / expected - 1)
    assert error <= rtol, f"{actual!r} is off {expected!r} by {error:.1e} relative"


def assert_close_scores(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float, floor: float = 1e-6
) -> None:
    """Raise unless all entries agree relatively, and names and shapes exactly.

    An entry below ``floor`` times its tensor's largest is allowed that bound's absolute error.
    """
    missing, extra = expected.keys() - actual.keys(), actual.keys() - expected.keys()
    assert not missing and not extra, f"missing {sorted(missing)}, unexpected {sorted(extra)}"
    for name, wanted in expected.items():
        got = actual[name]
        assert got.shape == wanted.shape, f"{name}: {tuple(got.shape)}, not {tuple(wanted.shape)}"
        least = floor * wanted.abs().max().item()
        # Block by block: what is in between of a hundred million entries fits a cache.
        for first, (some, want) in enumerate(
            zip(got.reshape(-1).split(BLOCK), wanted.reshape(-1).split(BLOCK), strict=True)
        ):
            wrong = ~((some.double() - want).abs_() <= want.abs().clamp_(min=least).mul_(rtol))
            if wrong.any():
                flat = first * BLOCK + int(torch.nonzero(wrong)[0])
                index = [int(i) for i in torch.unravel_index(torch.tensor(flat), wanted.shape)]
                raise AssertionError(
                    f"{name}{index}: {got[tuple(index)].item()!r}, not "
                    f"{wanted[tuple(index)].item()!r}; more may be off"
                )


@pytest.fixture(autouse=True)
def _one_thread_and_a_clean_memory() -> Iterator[None]:
    """Small tensors gain nothing from threads, and lose much on a busy machine.

    Afterwards let go of gigabytes: graphs hold cycles that reference counting misses.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    gc.collect()


@pytest.fixture
def _captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture and rewrite the model of a test once for both number formats: it takes longest."""
    known: dict[int, Any] = {}

    def once(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(read: Any, *asked: Any) -> Any:
            if id(read) not in known:
                known[id(read)] = read, function(read, *asked)  # alive: no other gets its id
            return known[id(read)][1]

        return call

    monkeypatch.setattr(program, "take_in", once(take_in))
    monkeypatch.setattr(program, "rewrite", once(rewrite))


@pytest.mark.usefixtures("_captured_once")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.long] * (name in SIBLINGS))
        for name in (*INPUTS, "vgg_bn")
    ],
)
def test_agrees_with_the_reference(name: str) -> None:
    model, shape = build(name), INPUTS.get(name, SMALL)
    scored = name in SCORED
    expected = reference(model, shape, scores=scored)
    source: nn.Module | torch.export.ExportedProgram = model
    if not scored:
        source = torch.export.export(model.eval(), (torch.ones(1, *shape),))
    for dtype, rtol in NORM_TOLERANCES.items():
        if not scored:
            assert_close_norm(
                fxpath.path_norm(source, shape, dtype=dtype), expected.path_norm, rtol
            )
            continue
        analysis = fxpath.analyze(source, shape, dtype=dtype)
        named = {parameter for parameter, _ in model.named_parameters()}
        assert {*analysis.scores, *analysis.unscored} == named
        # Heads of training apart, no parameter of these networks does nothing.
        idle = {n for n, reason in analysis.unscored.items() if "part of" not in reason}
        assert all(n.lower().startswith("aux") for n in idle)
        assert_close_norm(analysis.path_norm, expected.path_norm, rtol)
        assert analysis.log10_path_norm == pytest.approx(expected.log10_path_norm, abs=rtol)
        # Some in float64, where float32 would make zeros of small shares.
        formats = {score.dtype for score in analysis.scores.values()}
        assert dtype in formats and formats <= {dtype, torch.float64}
        assert_close_scores(analysis.scores, expected.scores, SCORE_TOLERANCES[dtype])


@pytest.mark.parametrize("name", ["densenet", "googlenet", "mobilenet", "deeplabv3"])
def test_other_exponents(name: str) -> None:
    model, shape = build(name), SMALL
    for q, norm in fxpath.path_norms(model, shape, q=(0, 0.75, 2, 4)).items():
        assert_close_norm(norm, reference(model, shape, q, scores=False).path_norm, 1e-9)


# What torchvision's modules do that is outside the theory, operation by operation.
OBSTACLES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.SiLU: ("silu",),
    nn.Sigmoid: ("sigmoid",),
    nn.GELU: ("gelu",),
    nn.Tanh: ("tanh",),
    nn.Hardswish: ("hardswish",),
    nn.LayerNorm: ("layer_norm",),
    convnext.LayerNorm2d: ("layer_norm",),
    torchvision.ops.SqueezeExcitation: ("mul",),
    nn.MultiheadAttention: ("scaled_dot_product_attention",),
    maxvit.RelativePositionalMultiHeadAttention: ("einsum", "softmax", "einsum"),
    swin.ShiftedWindowAttention: ("matmul", "softmax", "matmul"),
    # Cosine attention divides by norms first.
    swin.ShiftedWindowAttentionV2: (
        *("linalg_vector_norm", "div") * 2,
        *("matmul", "softmax", "matmul"),
    ),
}


def operations(report: fxpath.SupportReport) -> Counter[str]:
    """Count a report's problems by operation: ``aten.silu_.default`` is a silu."""
    return Counter(problem.operation.split(".")[1].rstrip("_") for problem in report.problems)


def assert_refused(model: nn.Module, shape: tuple[int, ...]) -> fxpath.SupportReport:
    """Raise unless a model is refused and each problem tells its whole story."""
    report = fxpath.check(model, shape)
    assert not report and not report.supported and report.problems
    for problem in report.problems:
        assert isinstance(problem.module_path, str)
        for field in ("operation", "node", "source_line", "reason", "remedy"):
            text = getattr(problem, field)
            assert isinstance(text, str) and text, (field, problem)
    assert len({problem.node for problem in report.problems}) == len(report.problems)
    return report


#: Models that are built of the same modules as another one, only more often; tracing them takes as
#: long as all others together.
DEEPER = {
    **dict.fromkeys(("swin_s", "swin_b"), "swin_t"),
    **dict.fromkeys(("swin_v2_s", "swin_v2_b"), "swin_v2_t"),
    **{f"efficientnet_b{i}": "efficientnet_b0" for i in range(1, 8)},
    **dict.fromkeys(("efficientnet_v2_m", "efficientnet_v2_l"), "efficientnet_v2_s"),
    **{f"regnet_y_{size}gf": "regnet_y_400mf" for size in ("1_6", "3_2", "8", "16", "32", "128")},
    "regnet_y_800mf": "regnet_y_400mf",
    **{f"convnext_{size}": "convnext_tiny" for size in ("small", "base", "large")},
    **dict.fromkeys(("vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"), "vit_b_16"),
}


@pytest.mark.parametrize("name", DEEPER)
def test_deeper_models_have_no_other_modules(name: str) -> None:
    assert module_types(name) == module_types(DEEPER[name])


@pytest.mark.parametrize("name", [name for name in refused() if name not in DEEPER])
def test_is_refused_with_every_obstacle(name: str) -> None:
    model = build_hollow(name)
    # Fewer windows of Swin, of which the first half of the stages shifts some at either size.
    side = 64 if name.startswith("swin") else 224
    report = assert_refused(model, (3, side, side))
    expected = Counter(
        operation for module in model.modules() for operation in OBSTACLES.get(type(module), ())
    )
    assert operations(report) == expected


def test_every_squeeze_and_activation_of_an_efficientnet_is_listed() -> None:
    model = build_hollow("efficientnet_b0")
    counts = Counter(type(module) for module in model.modules())
    gates = counts[torchvision.ops.SqueezeExcitation]
    assert operations(assert_refused(model, (3, 64, 64))) == {
        "silu": counts[nn.SiLU],
        "sigmoid": gates,
        "mul": gates,
    }


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_transformer_is_refused(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first)
    found = operations(assert_refused(layer, (5, 16)))
    assert found["layer_norm"] == 2 and found["scaled_dot_product_attention"] == 1
    stack = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    found = operations(assert_refused(stack, (5, 16)))
    assert found["layer_norm"] == 6 and found["scaled_dot_product_attention"] == 3


#: Networks of torchvision's blocks with fewer of them.
SHALLOW: dict[str, Callable[[], nn.Module]] = {
    "efficientnet": lambda: torchvision.models.EfficientNet(
        [efficientnet.MBConvConfig(t, 3, 2, 16, 16, 1) for t in (1, 6)], 0.2, last_channel=32
    ),
    "mobilenet_v3": lambda: torchvision.models.MobileNetV3(
        [mobilenetv3.InvertedResidualConfig(16, 3, 16, 16, True, a, 2, 1, 1) for a in ("RE", "HS")],
        32,
    ),
    "swin": lambda: torchvision.models.SwinTransformer([4, 4], 12, [2], [3], [4, 4]),
    "vit": lambda: torchvision.models.VisionTransformer(64, 32, 2, 3, 12, 24),
}


@pytest.mark.parametrize("name", SHALLOW)
def test_analyze_raises_what_check_reports(name: str) -> None:
    model = SHALLOW[name]()
    with pytest.raises(fxpath.UnsupportedModelError) as caught:
        fxpath.analyze(model, (3, 64, 64))
    assert len(caught.value.report.problems) >= 4
    assert caught.value.report == fxpath.check(model, (3, 64, 64))
    assert all(problem.node in str(caught.value) for problem in caught.value.report.problems)


# The comparisons have to be able to fail.


@pytest.mark.parametrize("wrong", [1.002, 0.998, 0.0, -1.0, float("inf"), float("nan")])
def test_a_wrong_norm_is_noticed(wrong: float) -> None:
    assert_close_norm(1.0005, 1.0, 1e-3)
    with pytest.raises(AssertionError):
        assert_close_norm(wrong, 1.0, 1e-3)


@pytest.mark.parametrize("expected", [0.0, float("inf"), float("nan")])
def test_a_degenerate_norm_is_no_agreement(expected: float) -> None:
    with pytest.raises(AssertionError):
        assert_close_norm(expected, expected, 1e-3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"a": [0.5, 1e-3, 1.002e-9]},  # beyond the floor's absolute error
        {"a": [0.5, 1.002e-3, 1e-12]},
        {"a": [0.5, 1e-3, float("nan")]},
        {"a": [0.0, 0.0, 0.0]},
        {"a": [0.5, 1e-3]},
        {"a": [[0.5, 1e-3, 1e-12]]},
        {},
        {"b": [0.5, 1e-3, 1e-12]},
        {"a": [0.5, 1e-3, 1e-12], "b": [0.0]},
    ],
)
def test_wrong_scores_are_noticed(wrong: dict[str, list[float]]) -> None:
    expected = {"a": torch.tensor([0.5, 1e-3, 1e-12], dtype=torch.float64)}
    assert_close_scores({"a": torch.tensor([0.50001, 1e-3, 1e-11])}, expected, 1e-3)
    with pytest.raises(AssertionError):
        assert_close_scores({k: torch.tensor(v) for k, v in wrong.items()}, expected, 1e-3)


def test_a_model_with_a_bias_left_out_is_noticed() -> None:
    """The oracle and the tolerances tell apart what differs by a single small bias."""
    model, shape = build("resnet18"), (3, 33, 33)
    before = reference(model, shape)
    model.bn1.bias.data[0] += 1.0
    after = reference(model, shape)
    with pytest.raises(AssertionError):
        assert_close_norm(before.path_norm, after.path_norm, NORM_TOLERANCES[torch.float32])
    with pytest.raises(AssertionError):
        assert_close_scores(before.scores, after.scores, SCORE_TOLERANCES[torch.float32])


def test_a_wrong_score_is_noticed_in_any_block_of_a_large_tensor() -> None:
    expected = {"a": torch.ones(3, BLOCK, dtype=torch.float64)}
    actual = {"a": torch.ones(3, BLOCK)}
    assert_close_scores(actual, expected, 1e-3)
    actual["a"][1, 5] = 0.99
    with pytest.raises(AssertionError, match=r"^a\[1, 5\]: 0\.99"):
        assert_close_scores(actual, expected, 1e-3)
