"""What has no path-lifting is refused by name, wherever it stands and however it is written."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxpath
from tests.oracles.steps import Call

SHAPE = (4, 6)


IMAGE = (4, 6, 6)


INF = float("inf")


class Around(nn.Module):
    """Layers around an operation; the rest of the network is supported."""

    def __init__(self, op: nn.Module, shape: tuple[int, ...], inputs: int = 1) -> None:
        super().__init__()
        make = [nn.Conv1d, nn.Conv2d, nn.Conv3d][len(shape) - 2]
        self.before = nn.ModuleList(make(2, shape[0], 1) for _ in range(inputs))
        self.op = op
        self.input_shape = (2, *shape[1:])

    def forward(self, x: Tensor) -> Any:
        outputs = self.op(*[layer(x) for layer in self.before])
        tensors = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(y if y.dtype == torch.long else y.flatten(1).sum(1) for y in tensors)


class First(nn.Module):
    """The first output of a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)[0]


def _attention(x: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(x, x, x)


def _noise(x: Tensor) -> Tensor:
    return x + torch.randn_like(x)


def _fresh_noise(x: Tensor) -> Tensor:
    return x + torch.rand(x.shape, dtype=x.dtype)


def _batch_statistics(x: Tensor) -> Tensor:
    return functional.batch_norm(x, None, None, training=True)


def _training_statistics(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return functional.batch_norm(x, mean, variance, training=True)


def _used_indices(x: Tensor) -> Tensor:
    values, indices = functional.max_pool2d(x, 2, return_indices=True)
    return functional.max_unpool2d(values, indices, 2)


def _padded_with_infinity(x: Tensor) -> Tensor:
    return functional.pad(x, (1, 1), value=-INF).clamp(min=-1.0)


def _infinity_read_twice(x: Tensor) -> tuple[Tensor, Tensor]:
    y = functional.pad(x, (1, 1), value=-INF)
    return functional.max_pool1d(y, 3, 1), y.relu()


def _infinity_before_average(x: Tensor) -> Tensor:
    return functional.avg_pool1d(functional.pad(x, (1, 1), value=-INF), 3, 1)


# What the operation is called in the report, and a call of it on one activation.
UNARY: dict[str, Callable[..., Any]] = {
    "softmax": nn.Softmax(1),
    "softmax:method": lambda x: x.softmax(-1),
    "log_softmax": nn.LogSoftmax(1),
    "softmax:softmin": nn.Softmin(1),
    "sigmoid": nn.Sigmoid(),
    "sigmoid:inplace": lambda x: x.sigmoid_(),
    "log_sigmoid": nn.LogSigmoid(),
    "tanh": nn.Tanh(),
    "tanh:inplace": lambda x: x.tanh_(),
    "gelu": nn.GELU(),
    "gelu:tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(),
    "silu:inplace": nn.SiLU(inplace=True),
    "mish": nn.Mish(),
    "elu": nn.ELU(),
    "elu:inplace": nn.ELU(inplace=True),
    "selu": nn.SELU(),
    "celu": nn.CELU(),
    "softplus": nn.Softplus(),
    "div:softsign": nn.Softsign(),
    "tanh:shrink": nn.Tanhshrink(),
    "hardswish": nn.Hardswish(),
    "hardshrink": nn.Hardshrink(),
    "softshrink": nn.Softshrink(),
    "threshold": nn.Threshold(0.5, 0.0),
    "threshold:value": nn.Threshold(0.0, -1.0),
    "glu": nn.GLU(1),
    "exp": torch.exp,
    "log": lambda x: torch.log(x.abs() + 1),
    "log1p": lambda x: torch.log1p(x.abs()),
    "sqrt": lambda x: x.abs().sqrt(),
    "rsqrt": lambda x: (x.abs() + 1).rsqrt(),
    "pow": lambda x: x**2,
    "square|pow": torch.square,
    "reciprocal": lambda x: torch.reciprocal(x.abs() + 1),
    "reciprocal|div": lambda x: 1 / (x.abs() + 1),
    "sin": torch.sin,
    "sign": torch.sign,
    "floor": torch.floor,
    "round": torch.round,
    "erf": torch.erf,
    "logsumexp": lambda x: x.logsumexp(1),
    "cumprod": lambda x: x.cumprod(1),
    "prod": lambda x: x.prod(1),
    "var": lambda x: x.var(1),
    "std": lambda x: x.std(1),
    "norm": lambda x: x.norm(dim=1, keepdim=True),
    "norm:normalize": lambda x: functional.normalize(x, dim=1),
    "layer_norm": nn.LayerNorm(6),
    "group_norm": nn.GroupNorm(2, 4),
    "instance_norm": nn.InstanceNorm1d(4),
    "rms_norm": nn.RMSNorm(6),
    "batch_norm": _batch_statistics,
    "batch_norm:training": Call(_training_statistics, mean=torch.zeros(4), variance=torch.ones(4)),
    "batch_norm:no-statistics": nn.BatchNorm1d(4, track_running_stats=False),
    "dropout": lambda x: functional.dropout(x, 0.5, training=True),
    "dropout:inplace": lambda x: functional.dropout(x, 0.5, True, True),
    "dropout:feature": lambda x: functional.dropout1d(x, 0.5, training=True),
    "dropout:alpha": lambda x: functional.alpha_dropout(x, 0.5, training=True),
    "rrelu": lambda x: functional.rrelu(x, 0.1, 0.3, training=True),
    "rand": _noise,
    "rand:fresh": _fresh_noise,
    "bernoulli": lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)),
    "argmax": lambda x: (x, x.argmax(1)),
    "argmax:fed-back": lambda x: x * x.argmax(1, keepdim=True),
    "max:indices": lambda x: x.max(1).indices,
    "argmin": lambda x: (x, x.argmin(1)),
    "sort:indices": lambda x: x.sort(1).indices,
    "topk:order": lambda x: x.topk(2, 1, sorted=False).values,
    "gather": lambda x: x.gather(1, x.sort(1).indices),
    "index": lambda x: torch.arange(4.0)[x.to(torch.long)],
    "scatter": lambda x: x.scatter(1, torch.zeros_like(x, dtype=torch.long), x * 2),
    "scatter_reduce": lambda x: x.scatter_reduce(
        1, torch.zeros(1, 4, 6, dtype=torch.long).expand(len(x), 4, 6), x, "prod"
    ),
    "gt": lambda x: x * (x > 0),
    "ge:where": lambda x: torch.where(x >= 0, x, -2 * x),
    "bitwise|isnan|ne": lambda x: x.isnan().to(x),
    "to": lambda x: x.to(torch.int32).to(x),
    "mul": lambda x: x * x,
    "mul:relu": lambda x: x * x.relu(),
    "mul:inplace": lambda x: x.mul_(x.relu()),
    "mul:gate": lambda x: x * x.mean(1, keepdim=True),
    "div": lambda x: x / (x.abs() + 1),
    "div:floor": lambda x: torch.div(x, 2, rounding_mode="floor"),
    "fmod|remainder": lambda x: x % 2,
    "addcmul": lambda x: torch.addcmul(x, x, x),
    "matmul|bmm": lambda x: x @ x.mT,
    "bmm": lambda x: torch.bmm(x, x.transpose(1, 2)),
    "baddbmm": lambda x: torch.baddbmm(x[:, :, :4], x, x.mT),
    "einsum|bmm|matmul": lambda x: torch.einsum("nij,nkj->nik", x, x),
    "bilinear": Call(lambda x, weight: functional.bilinear(x, x, weight), weight=(3, 6, 6)),
    "linear": lambda x: functional.linear(x, x[0]),
    "conv1d": lambda x: functional.conv1d(x, x[0, :, :, None].expand(4, 6, 4).mT[:, :, :1]),
    "scaled_dot_product_attention": _attention,
    "scaled_dot_product_attention|native_multi_head|softmax": nn.TransformerEncoderLayer(
        6, 2, 8, batch_first=True
    ),
    "lstm": First(nn.LSTM(6, 3, batch_first=True)),
    "gru": First(nn.GRU(6, 3, batch_first=True)),
    "rnn": First(nn.RNN(6, 3, batch_first=True)),
    "pad": _padded_with_infinity,
    "pad:read-twice": _infinity_read_twice,
    "pad:average": _infinity_before_average,
    "pad:plus-infinity": lambda x: functional.max_pool1d(functional.pad(x, (1, 1), value=INF), 3),
    "item": lambda x: x * x.sum().item(),
    "pool|pow": nn.LPPool1d(2, 2),
    "fft": lambda x: torch.fft.rfft(x).real,
    "cdist": lambda x: torch.cdist(x, x),
    "cosine_similarity": lambda x: functional.cosine_similarity(x, x, 1),
}


IMAGES: dict[str, Callable[..., Any]] = {
    "group_norm": nn.GroupNorm(1, 4),
    "instance_norm": nn.InstanceNorm2d(4),
    "softmax": nn.Softmax2d(),
    "max_unpool2d": _used_indices,
    "fractional_max_pool2d": nn.FractionalMaxPool2d(2, output_size=3),
    "local_response_norm|div|pow": nn.LocalResponseNorm(2),
    "pool|pow": nn.LPPool2d(2, 2),
    "grid_sampl": lambda x: functional.grid_sample(x, x[:, :2].movedim(1, -1), align_corners=False),
    "dropout": lambda x: functional.dropout2d(x, 0.5, training=True),
}


BINARY: dict[str, Callable[..., Any]] = {
    "mul": torch.mul,
    "div": torch.div,
    "matmul": lambda x, y: x @ y.mT,
    "atan2": torch.atan2,
    "pow": lambda x, y: x**y,
    "where|gt": lambda x, y: torch.where(x > y, x, y),
    "lerp": lambda x, y: torch.lerp(x, y, x),
}


def _module(op: Callable[..., Any]) -> nn.Module:
    return op if isinstance(op, nn.Module) else Call(op)


def _params(table: dict[str, Callable[..., Any]]) -> list[Any]:
    return [pytest.param(key.partition(":")[0], op, id=key) for key, op in table.items()]


def assert_refused(model: nn.Module, shape: tuple[int, ...], names: str) -> fxpath.SupportReport:
    """The report and the exception both name one of the operations (separated by bars)."""
    report = fxpath.check(model, shape)
    assert not report and not report.supported
    with pytest.raises(fxpath.UnsupportedModelError) as caught:
        fxpath.analyze(model, shape)
    assert caught.value.report == report
    found = [problem.operation for problem in report.problems]
    alternatives = names.split("|")
    assert any(name in operation for name in alternatives for operation in found), found
    for problem in report.problems:
        assert problem.reason and problem.remedy
        assert problem.operation in str(caught.value)
    return report


@pytest.mark.parametrize(("name", "op"), _params(UNARY))
def test_refused_operations(name: str, op: Callable[..., Any]) -> None:
    assert_refused(Around(_module(op), SHAPE), (2, 6), name)


class Signed(nn.Module):
    """Signs that are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.signs = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        """Copy them."""
        return torch.copysign(x, self.signs)


REASONS: dict[str, tuple[Callable[..., Any], str]] = {
    "elu": (functional.elu, "exponential below zero"),
    "exp": (torch.exp, "not piecewise linear"),
    "hardswish": (functional.hardswish, "multiplies an activation with a function"),
    "softshrink": (functional.softshrink, "write x - x.clamp"),
    "hardshrink": (functional.hardshrink, "jumps"),
    "round": (torch.round, "jumps"),
    "copysign": (lambda x: torch.copysign(x.abs(), x), "jumps"),
    "threshold": (lambda x: functional.threshold(x, 0.5, 0.0), "jumps"),
    "norm": (lambda x: x.norm(dim=1), "order 2"),
    "std": (lambda x: x.std(1), "variance"),
    "prod": (lambda x: x.prod(1), "multiplies activations"),
    "pow": (lambda x: x**2, "multiplies activations"),
    "randn_like": (_noise, "random"),
    "multinomial": (lambda x: x * torch.multinomial(torch.ones(6), 1), "random"),
    "gt": (lambda x: x * (x > 0), "booleans"),
    "argsort": (lambda x: x * x.argsort(1), "positions or an order"),
    "topk": (lambda x: x.topk(2, 1, sorted=False).values, "no defined order"),
    "rnn_tanh": (First(nn.RNN(6, 3, batch_first=True)), "gates"),
    "lstm": (First(nn.LSTM(6, 3, batch_first=True)), "gates"),
    "instance_norm": (nn.InstanceNorm1d(4), "track_running_stats=True"),
    "view_as_real": (lambda x: torch.view_as_real(x.to(torch.complex64)), "complex"),
    "fft_rfft": (lambda x: torch.fft.rfft(x).real, "complex"),
    "div": (lambda x: x / 0, "divides by zero"),
    "div:tensor": (lambda x: x / torch.tensor([0.0, 1, 1, 1, 1, 1]), "divides by zero"),
    "mul": (lambda x: x * INF, "the number inf"),
    "mul:nan": (lambda x: x * float("nan"), "the number nan"),
    "mul:complex": (lambda x: x * (2 + 1j), "complex|2[+]1j"),
    "add": (lambda x: x + torch.full((6,), -INF), "infinite or NaN"),
    "logsumexp": (lambda x: x.logsumexp(1), "not piecewise linear"),
    "cdist": (lambda x: torch.cdist(x, x), "all pairs"),
    "masked_fill": (lambda x: x.masked_fill(x > 0, 1.0), "booleans"),
    "empty": (lambda x: x + torch.empty(6), "never written to"),
    "index": (lambda x: x[:, [9]], "position 9 of an axis of length 4"),
    **{
        name: (op, "position -1 of an axis of length 4")
        for name, op in {
            "gather": lambda x: x.gather(1, torch.full((1, 1, 6), -1)),
            "scatter": lambda x: x.scatter(1, torch.full((1, 1, 6), -1), x[:, :1]),
            "index_add": lambda x: x.index_add(1, torch.tensor([-1]), x[:, :1]),
            "index_copy": lambda x: x.index_copy(1, torch.tensor([-1]), x[:, :1]),
            "index_select": lambda x: x.index_select(1, torch.tensor([-1])),
        }.items()
    },
    "clamp": (lambda x: x.clamp(torch.full((6,), float("nan"))), "NaN"),
    "pad": (lambda x: functional.pad(x, (1, 1), value=float("nan")), "NaN"),
    "scatter_reduce": (
        lambda x: torch.full((1, 4, 6), -INF).scatter_reduce(
            1, torch.zeros(1, 4, 6, dtype=torch.int64), x, "amax"
        ),
        "compares nothing at some places",
    ),
    "copysign:parameter": (Signed(), "signs depend on parameters"),
    "unique": (lambda x: x + x.unique().sum(), "how many entries"),
    "solve": (
        lambda x: torch.linalg.solve(torch.eye(4), x[0]),
        "linear in the right-hand side",
    ),
    "matrix_norm": (lambda x: x + torch.linalg.matrix_norm(x[0], 2), "order 2"),
}


@pytest.mark.parametrize("key", REASONS)
def test_reasons_are_true(key: str) -> None:
    """The first problem names the operation, and says what stands in the way."""
    op, reason = REASONS[key]
    report = fxpath.check(Around(_module(op), SHAPE), (2, 6))
    assert not report
    first = report.problems[0]
    assert re.search(reason, f"{first.reason}; {first.remedy}"), first
    assert first.source_line and first.operation


def test_memory_that_was_never_written_is_refused() -> None:
    """Half of an empty tensor is read before anything stands there."""

    def half_written(x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        y[:, :2] = x[:, 2:]
        return y

    report = assert_refused(Around(_module(half_written), SHAPE), (2, 6), "empty")
    assert "never written to" in report.problems[0].reason


@pytest.mark.parametrize(("name", "op"), _params(IMAGES))
def test_refused_operations_on_images(name: str, op: Callable[..., Any]) -> None:
    assert_refused(Around(_module(op), IMAGE), (2, 6, 6), name)


@pytest.mark.parametrize(("name", "op"), _params(BINARY))
def test_refused_operations_on_two_activations(name: str, op: Callable[..., Any]) -> None:
    assert_refused(Around(_module(op), SHAPE, inputs=2), (2, 6), name)


def test_every_problem_is_listed_where_it_stands() -> None:
    """Three offenders in three modules, one of them twice, between supported layers."""
    block = nn.Sequential(nn.Linear(6, 6), nn.Sigmoid(), nn.ReLU())
    model = nn.Sequential(block, nn.Tanh(), nn.Linear(6, 6), nn.Sigmoid(), nn.Softmax(1))
    report = assert_refused(model, (6,), "sigmoid")
    found = [(problem.operation, problem.module_path) for problem in report.problems]
    names = [(operation.split(".")[1], path) for operation, path in found]
    assert names == [("sigmoid", "0.1"), ("tanh", "1"), ("sigmoid", "3"), ("softmax", "4")]
    assert len({problem.node for problem in report.problems}) == 4


class Gated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)  # the line that the report shows


def test_source_line_of_a_function_call() -> None:
    report = assert_refused(nn.Sequential(nn.Linear(3, 3), Gated()), (3,), "sigmoid")
    assert {problem.operation.split(".")[1] for problem in report.problems} == {"mul", "sigmoid"}
    for problem in report.problems:
        assert problem.module_path == "1"
        assert "test_operations_refused.py" in problem.source_line
        assert "the line that the report shows" in problem.source_line


def test_training_mode_is_not_training_hard_coded() -> None:
    """A model that merely was left in training mode is analysed in eval mode."""
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.RReLU())
    assert fxpath.check(model.train(), (2, 4))
    assert model.training and model[1].training
    expected = fxpath.path_norm(model.eval(), (2, 4))
    assert fxpath.path_norm(model.train(), (2, 4)) == pytest.approx(expected, rel=1e-12)


def test_unsupported_operations_that_nobody_reads() -> None:
    """Dead code is no obstacle."""

    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            torch.sigmoid(y)
            return y

    model = Dead()
    assert fxpath.check(model, (3,))
    weight, bias = (p.detach().double().abs() for p in (model.linear.weight, model.linear.bias))
    assert fxpath.path_norm(model, (3,)) == pytest.approx(float(weight.sum() + bias.sum()))
