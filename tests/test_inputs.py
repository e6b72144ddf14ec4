"""How many samples count, which inputs a model is traced with, which outputs count."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fxpath
from fxpath.capture import capture
from fxpath.model import Given


class Policy(nn.Module):
    """Inputs in dicts and lists, one of them optional."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 3), nn.Linear(5, 3), nn.Linear(3, 2)

    def forward(self, obs: Any, extra: Tensor | None = None) -> Tensor:
        first, second = obs.values() if isinstance(obs, dict) else obs
        hidden = torch.relu(self.a(first) + self.b(second))
        return self.out(hidden if extra is None else hidden + extra)


def expected(policy: Policy) -> float:
    """By hand, in float64; the two biases are two paths."""
    with torch.no_grad():
        layers = (policy.a, policy.b)
        hidden = sum(m.weight.double().abs().sum(1) + m.bias.double().abs() for m in layers)
        out = policy.out.weight.double().abs() @ hidden + policy.out.bias.double().abs()
        return float(out.sum())


def pair(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4), torch.randn(n, 5)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_one_sample_counts_wherever_the_tensor_stands(n: int) -> None:
    model, (a, b) = Policy(), pair(n)
    want = pytest.approx(expected(model), rel=1e-6)
    assert fxpath.path_norm(model, example_inputs=({"a": a, "b": b},)) == want
    assert fxpath.path_norm(model, example_inputs=([a, b],)) == want
    assert fxpath.path_norm(model, example_inputs=((a, b),), example_kwargs={"extra": None}) == want
    assert fxpath.path_norm(model, example_kwargs={"obs": (a, b)}) == want
    other = Policy()
    small = fxpath.path_metric(model, other, example_inputs=([a[:1], b[:1]],))
    assert fxpath.path_metric(model, other, example_inputs=([a, b],)).lower == small.lower


def test_inputs_that_differ_in_length_are_an_error() -> None:
    a, b = pair(6)
    with pytest.raises(ValueError, match=r"example_inputs\[0\]\[1\]: 3.*batch_dim=None"):
        fxpath.path_norm(Policy(), example_inputs=([a, b[:3]],))
    with pytest.raises(ValueError, match=r"example_kwargs\['extra'\]: 2"):
        fxpath.path_norm(
            Policy(), example_inputs=([a, b],), example_kwargs={"extra": torch.ones(2, 3)}
        )
    # One row is the same for all samples.
    model = Policy()
    whole = fxpath.path_norm(model, example_inputs=([a, b[:1]],))
    assert whole == pytest.approx(expected(model), rel=1e-6)


def test_without_a_batch_axis_inputs_are_taken_as_they_are() -> None:
    model = nn.Linear(3, 2)
    one = fxpath.path_norm(model, (3,))
    rows = torch.randn(5, 3)
    assert fxpath.path_norm(model, example_inputs=rows) == pytest.approx(one)
    assert fxpath.path_norm(model, example_inputs=rows, batch_dim=None) == pytest.approx(5 * one)
    assert fxpath.path_norm(model, (5, 3), batch_dim=None) == pytest.approx(5 * one)
    assert fxpath.path_norm(model, (5, 3), batch_dim=1) == pytest.approx(5 * one)
    assert fxpath.path_norm(model, example_inputs=rows, batch_dim=-2) == pytest.approx(one)
    with pytest.raises(ValueError, match="batch_dim=3"):
        fxpath.path_norm(model, (3,), batch_dim=3)


class Graph(nn.Module):
    """Rows are nodes: no sample without its neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("adjacency", torch.rand(6, 6))
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.adjacency, Tensor)
        return self.adjacency @ torch.relu(self.layer(x))


class Fixed(nn.Module):
    """The batch size is written into the code."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(4, 6))


def test_rows_that_meet_are_no_batch_and_a_fixed_batch_is_an_error() -> None:
    model = Graph()
    with torch.no_grad():
        hidden = model.layer.weight.abs().sum(1) + model.layer.bias.abs()
        assert isinstance(model.adjacency, Tensor)
        want = pytest.approx(float(model.adjacency.sum() * hidden.sum()), rel=1e-5)
    captured = capture(model, Given(example_inputs=torch.randn(6, 3)))
    assert captured.inputs.batch_dim is None and str(captured.inputs) == "x: 6 x 3 (no batch axis)"
    assert fxpath.path_norm(model, example_inputs=torch.randn(6, 3)) == want
    assert fxpath.path_norm(model, (6, 3), batch_dim=None) == want
    with pytest.raises(ValueError, match="batch size is written into its code"):
        fxpath.path_norm(Fixed(), example_inputs=torch.randn(4, 2, 3))
    fixed = Fixed()
    whole = fxpath.path_norm(fixed, (4, 2, 3), batch_dim=None)
    assert whole == pytest.approx(4 * fxpath.path_norm(fixed.layer, (6,)), rel=1e-6)


# -- keywords, shapes ------------------------------------------------------------------------------


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, *, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.b(torch.relu(self.a(x)))
        return {"probability": logits.softmax(1), "logits": logits, "best": logits.argmax(1)}


def test_keyword_inputs_and_named_outputs() -> None:
    model = Keyword()
    want = pytest.approx(fxpath.path_norm(nn.Sequential(model.a, nn.ReLU(), model.b)), rel=1e-6)
    x = torch.randn(3, 5)
    assert fxpath.path_norm(model, {"x": (5,)}, outputs="logits") == want
    assert fxpath.path_norm(model, example_kwargs={"x": x}, outputs=["logits"]) == want
    assert fxpath.path_norm(model, {"x": (5,)}, until="b") == want
    for verb in (fxpath.rescale, fxpath.normalize, fxpath.channel_groups):
        verb(model, {"x": (5,)}, outputs="logits")
    assert fxpath.quantize(model, 8, input_shape={"x": (5,)}, until="b").certificate.exact
    assert float(fxpath.path_lifting(model, {"x": (5,)}, until="b").phi.abs().sum()) == want
    for outputs in ("nothing", 7, ["logits", "nothing"]):
        with pytest.raises(ValueError, match="names no output.*'logits'"):
            fxpath.path_norm(model, {"x": (5,)}, outputs=outputs)
    with pytest.raises(ValueError, match=r"do not fit forward.*example_kwargs"):
        fxpath.path_norm(model, (5,))
    with pytest.raises(ValueError, match="example_kwargs="):
        fxpath.path_norm(model, example_inputs={"x": x})  # type: ignore[arg-type]


class Named(NamedTuple):
    logits: Tensor
    best: Tensor


def test_outputs_by_field_and_each_once() -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Named:
            return Named(self.a(x), self.a(x).argmax(1))

    model = Picks()
    want = fxpath.path_norm(model.a)
    assert fxpath.path_norm(model.a, outputs=0) == want
    for outputs in (0, -2, "logits", ["logits"]):
        assert fxpath.path_norm(model, (5,), outputs=outputs) == want
    for outputs in ([], [0, 0]):
        with pytest.raises(ValueError, match="one output or more, each of them once"):
            fxpath.path_norm(model, (5,), outputs=outputs)
    with pytest.raises(ValueError, match="names no output: the model has"):
        fxpath.path_norm(model, (5,), outputs="other")


def test_lengths_of_other_integer_types() -> None:
    class Length:
        def __index__(self) -> int:
            return 5

    model: Any = nn.Linear(5, 4)
    assert fxpath.path_norm(model, (Length(),)) == fxpath.path_norm(model, (5,))
    for shape in (5, "5", 5.0):
        with pytest.raises(ValueError, match="pass a tuple of lengths"):
            fxpath.path_norm(model, shape)
    for wrong in ((5.0,), (None, 5), ("5",), (-5,)):
        with pytest.raises(ValueError, match="positive integer"):
            fxpath.path_norm(model, wrong)


def test_lengths_that_a_dynamic_program_fixes() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Conv1d(1, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            kept: Tensor = self.c(x)[:, :, : x.shape[2] // 2]
            return kept

    batch = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(Cut(), (torch.zeros(3, 1, 8),), dynamic_shapes=(batch,))
    model = Cut()
    model.load_state_dict(program.state_dict)
    for inputs in ({}, {"input_shape": (1, 8)}, {"example_inputs": torch.zeros(5, 1, 8)}):
        assert fxpath.path_norm(program, **inputs) == pytest.approx(fxpath.path_norm(model, (1, 8)))
    with pytest.raises(ValueError, match="takes no other"):
        fxpath.path_norm(program, (1, 12))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        y = self.a(x)
        return y.argmax(1), [y, y.sigmoid()]


def test_the_refusal_names_what_passes() -> None:
    report = fxpath.check(Keyword(), {"x": (5,)})
    assert {p.operation for p in report.problems} == {"aten.softmax.int", "aten.argmax.default"}
    assert all("outputs='logits' passes" in p.remedy for p in report.problems)
    # Of the second output one half is smooth, so that only a cut helps.
    assert all('until="a"' in p.remedy for p in fxpath.check(Pair(), (5,)).problems)
    head = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 1), nn.Sigmoid())
    with pytest.raises(fxpath.UnsupportedModelError, match='until="2"'):
        fxpath.normalize(head)
    assert fxpath.check(head, until="2")


def test_shapes_with_the_batch_axis_left_in() -> None:
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    for model, shape in ((conv, (1, 3, 8, 8)), (conv, (2, 3, 8, 8))):
        with pytest.raises(ValueError, match="has the batch axis in it: pass"):
            fxpath.path_norm(model, shape)


def test_the_inputs_are_known() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    inputs = capture(net, Given()).inputs
    assert inputs.assumed and str(inputs) == "input: 3 x 224 x 224 (assumed)"
    inputs = capture(net, Given((3, 9, 9))).inputs
    assert not inputs.assumed and inputs.shapes == {"input": (1, 3, 9, 9)}
    assert not capture(nn.Linear(3, 2), Given()).inputs.assumed


# -- exported programs -----------------------------------------------------------------------------


def test_an_exported_batch_is_cut() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5)
    ).eval()
    want = pytest.approx(fxpath.path_norm(model, (3, 9, 9)), rel=1e-6)
    for n in (1, 4):
        program = torch.export.export(model, (torch.randn(n, 3, 9, 9),))
        assert fxpath.path_norm(program) == want
        assert fxpath.path_norm(program, (3, 9, 9)) == want
        assert fxpath.path_norm(program, example_inputs=torch.randn(2, 3, 9, 9)) == want
    assert fxpath.path_norm(program, batch_dim=None) != want
    larger = fxpath.path_norm(model, (3, 12, 12))
    assert fxpath.path_norm(program, (3, 12, 12)) == pytest.approx(larger, rel=1e-6)
    with pytest.raises(ValueError, match="takes no other"):
        fxpath.path_norm(program, (7, 9, 9))
    # It stays bound to the program's own tensors.
    live = fxpath.compile(program, backend="eager")
    before = live.path_norm()
    program.state_dict["4.weight"].data.mul_(2)
    assert live.path_norm() > 1.2 * before


def test_an_exported_program_with_its_sizes_written_in() -> None:
    program = torch.export.export(Fixed().eval(), (torch.randn(4, 2, 3),))
    with pytest.raises(ValueError, match="batch of 4, which is written into it"):
        fxpath.path_norm(program)
    assert fxpath.path_norm(program, batch_dim=None) > 0
    with pytest.raises(ValueError, match=r"takes no other.*reshape|takes no other.*view"):
        fxpath.path_norm(program, (3, 2))
    graph = Graph().eval()
    nodes = torch.export.export(graph, (torch.randn(6, 3),))
    assert fxpath.path_norm(nodes) == fxpath.path_norm(graph, (6, 3), batch_dim=None)


class Data(nn.Module):
    """torch.export takes what `.data` gives for a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, *, more: dict[str, Tensor]) -> Tensor:
        return self.b(torch.relu(self.a(x)).data + more["h"])


def test_programs_of_every_kind() -> None:
    model = Data().eval()
    call = (torch.randn(4, 3),), {"more": {"h": torch.randn(4, 4)}}
    want = pytest.approx(fxpath.path_norm(model, example_inputs=call[0], example_kwargs=call[1]))
    strict = torch.export.export(model, *call, strict=True)
    for verb in (fxpath.path_norm, fxpath.path_magnitude):
        with pytest.raises(fxpath.UnsupportedModelError, match="x.detach"):
            verb(strict)
    assert not fxpath.check(strict)

    class Detached(Data):
        def forward(self, x: Tensor, *, more: dict[str, Tensor]) -> Tensor:
            return self.b(torch.relu(self.a(x)).detach() + more["h"])

    twin = Detached().eval()
    twin.load_state_dict(model.state_dict())
    batch = torch.export.Dim("batch", min=2, max=8)
    shapes = {"x": {0: batch}, "more": {"h": {0: batch}}}
    for program in (
        torch.export.export(twin, *call),
        torch.export.export(twin, *call, strict=True),
        torch.export.export(twin, *call).run_decompositions(),
        torch.export.export(twin, *call, dynamic_shapes=shapes),
    ):
        assert fxpath.path_norm(program) == want
        assert fxpath.check(program)


def test_what_is_no_model_or_no_input() -> None:
    with pytest.raises(TypeError, match="pass an nn.Module"):
        fxpath.path_norm("resnet18")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a tuple of all inputs"):
        fxpath.path_norm(nn.Linear(2, 2), example_inputs=3.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not both"):
        fxpath.path_norm(nn.Linear(2, 2), (2,), example_inputs=torch.ones(1, 2))
    empty = nn.Linear(2, 2, device="meta")
    with pytest.raises(ValueError, match="weight, bias: on the meta device"):
        fxpath.path_norm(empty)
    assert fxpath.check(empty)
    with torch.device("meta"):
        model = nn.Linear(2, 2, device="cpu")
        assert fxpath.path_norm(model) == pytest.approx(
            sum(float(p.detach().abs().sum()) for p in model.parameters())
        )
