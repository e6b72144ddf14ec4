"""A placed graph against the functional one, and convolutions' gradients as convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, fx

from fxpath.graph import ops, products
from fxpath.graph.aten import CONVOLUTION_BACKWARD
from fxpath.graph.convolution import convolution_backward
from fxpath.passes.derive import derive
from fxpath.passes.place import into, place
from tests.support.generated import bounded
from tests.support.lowered import CASES, Sketch, drawn, setting


def both(
    module: fx.GraphModule, tensors: Mapping[str, Tensor], q: float, dtype: torch.dtype, way: Any
) -> fx.GraphModule:
    """Compare a graph that writes into given memory with the functional one; returns it."""
    names = [str(n.target) for n in module.graph.nodes if n.op == "placeholder"]
    values = [tensors[name].to(dtype) for name in names]
    for ending in ("norm", "scores"):
        derived = derive(module, setting(q), dtype, ending)
        before = str(derived.graph)
        placed = way(derived, setting(q))
        assert str(derived.graph) == before
        kept = [value.clone() for value in values]
        expected = derived(*values)
        scores = expected.get("scores", {})
        out = [torch.full_like(score, torch.nan) for score in scores.values()]
        found = placed(*values, *out)
        assert found.keys() == expected.keys() and list(found.get("scores", {})) == list(scores)
        near = 1e-12 if dtype == torch.float64 else 1e-5
        for name, memory in zip(scores, out, strict=True):
            if way is place:
                assert found["scores"][name] is memory
            assert found["scores"][name].data_ptr() == memory.data_ptr()
            top = float(scores[name].max()) if memory.numel() else 0.0
            torch.testing.assert_close(memory, scores[name], rtol=0, atol=near * top)
        for memory, lows in zip(out, found.get("lows", ()), strict=True):
            # Of each part that was computed at once.
            each = products.parts(memory.shape, len(lows), memory.device)
            least = [memory[part].min() if memory.numel() else torch.inf for part in each]
            assert lows.tolist() == [float(low) for low in least]
        for name in expected.keys() - {"scores", "lows"}:
            torch.testing.assert_close(found[name], expected[name], rtol=near, atol=0)
        assert all(map(torch.equal, values, kept))  # nothing is written into the model
    return placed


@pytest.mark.parametrize("name", CASES)
def test_the_same_numbers_in_given_memory(name: str) -> None:
    module, tensors = drawn(name)
    both(module, tensors, 1, torch.float64, place)


@pytest.mark.parametrize("name", ["tied", "read twice", "one and many", "conv 2d", "empty"])
def test_the_same_numbers_for_compilers(name: str) -> None:
    module, tensors = drawn(name)
    both(module, tensors, 1, torch.float32, into)


def linear(rows: int, columns: int, batch: int, inner: bool) -> Sketch:
    """A weight that one product reads, of something that is differentiated, or of a source."""
    sketch = Sketch()
    x = sketch.value(batch, columns) if inner else sketch.source(batch, columns)
    made = sketch.emit(
        ops.contract, x, sketch.theta(rows, columns), sketch.theta(rows), "bi,oi->bo"
    )
    sketch.outputs = [made]
    return sketch


@pytest.mark.parametrize("batch", [1, 2, products.NARROW - 1, products.NARROW, products.NARROW + 1])
@pytest.mark.parametrize("rows", [1, 7, 16])
@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sweeps_of_several_blocks(
    batch: int, rows: int, inner: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "BLOCK", 12)  # three rows of four at a time
    sketch = linear(rows, 4, batch, inner)
    module = sketch.end(sketch.outputs)
    placed = both(module, sketch.tensors, 1, dtype, place)
    targets = [node.target for node in placed.graph.nodes]
    assert targets.count(products.sweep) == targets.count(products.sweep_back) == 1
    assert products.product not in targets and products.score not in targets


@pytest.mark.parametrize("block", [1, 3, 4, 5, 1 << 20])
@pytest.mark.parametrize("q", [0, 0.5, 1, 2])
def test_blocks_of_any_size(block: int, q: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "BLOCK", block)
    sketch = linear(5, 4, 3, True)
    module = sketch.end(sketch.outputs)
    both(module, sketch.tensors, q, torch.float64, place)
    size = products.block_size((5, 4), torch.device("cpu"))
    assert size == min(5, max(1, block // 4)) * 4
    assert products.block_size((5, 4), torch.device("meta")) == 20
    assert products.block_size((0, 4), torch.device("cpu")) == 0


def test_no_second_copy_of_a_weight() -> None:
    """What one product reads is swept; what else is scored is lifted where its scores stand."""
    for name, swept in (("contract one row", True), ("conv 1d", False)):
        module, _ = drawn(name)
        placed = place(derive(module, setting(), torch.float32), setting())
        targets = [node.target for node in placed.graph.nodes]
        assert (products.sweep_back in targets) == swept
        assert products.copy_into not in targets
        # Float64 in a float32 run: its largest entry is looked for before it is converted.
        lifts = placed.graph.find_nodes(op="call_function", target=products.lift)
        assert {user.target for lift in lifts for user in lift.users} <= {products.high}


# -- convolutions ----------------------------------------------------------------------------------


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Any, ...]:
    """Shapes and layout of a convolution that is one."""
    axes = draw(st.integers(1, 3))
    transposed, groups = draw(st.booleans()), draw(st.integers(1, 3))

    def each(low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=axes, max_size=axes))

    size, kernel, stride, padding = each(1, 6 - axes), each(1, 3), each(1, 3), each(0, 2)
    dilation = each(1, 2)
    spare = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
    output_padding = spare if transposed else [0] * axes
    batch, first, second = (draw(st.integers(1, 2)) for _ in range(3))
    x = (batch, groups * first, *size)
    weight = (groups * first, second, *kernel) if transposed else (groups * second, first, *kernel)
    return x, weight, stride, padding, dilation, transposed, output_padding, groups


@bounded(150)
@given(convolutions(), st.sampled_from([(True, True), (True, False), (False, True)]))
def test_gradients_of_a_convolution_as_convolutions(case: Any, mask: Any) -> None:
    shape, kernel, *spec = case
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(kernel, generator=generator, dtype=torch.float64)
    try:
        y = torch.ops.aten.convolution(x, weight, None, *spec)
    except RuntimeError:  # the kernel is larger than the image
        assume(False)
    assume(y.numel())
    grad = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    asked = [*mask, False]
    expected = CONVOLUTION_BACKWARD(grad, x, weight, None, *spec, asked)
    found = convolution_backward(grad, x, weight, None, *spec, asked)
    assert found[2] is None
    for got, wanted, needed in zip(found, expected, mask, strict=False):
        if needed:
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
        else:
            assert got is None
