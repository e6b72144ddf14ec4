"""Path-norms and scores against paths listed one by one (Def. A.5) on small random networks.

The first half makes sure of the oracle itself: formula (4), agreement with PyTorch, and formulas
(10) to (12) and (14). The second half holds the package against it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from enumeration import (
    ONE,
    Dag,
    Layer,
    Net,
    Weight,
    assert_same_shares,
)
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import fxpath

MAX_PATHS = 4000
EXPONENTS = (0, 0.5, 1, 2, 4)


def bounded(examples: int) -> settings:
    """The same examples in every run, without a clock."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


# Random networks ----------------------------------------------------------------------


WEIGHTS = st.sampled_from([-1.5, -1.0, -0.25, 0.0, 0.5, 0.75, 2.0])


@st.composite
def dags(draw: st.DrawFn) -> Dag:
    """Single neurons of every kind that read any earlier ones, pool neurons of any rank too."""
    dag = Dag()
    for _ in range(draw(st.integers(1, 3))):
        dag.add_input()
    hidden = draw(st.integers(1, 7))
    dag.shapes = {"edge": (hidden, 10), "bias": (hidden,)}
    for v in range(hidden):
        earlier = st.sampled_from(range(len(dag.neurons)))
        sources = draw(st.lists(earlier, min_size=1, max_size=4, unique=True))
        kind = draw(st.sampled_from(["identity", "relu", "relu", "pool"]))
        if kind == "pool":
            k = draw(st.integers(1, len(sources)))
            dag.add("pool", [(source, ONE) for source in sources], k=k)
            continue
        edges = [(u, Weight(draw(WEIGHTS), ("edge", (v, u)))) for u in sources]
        bias = Weight(draw(WEIGHTS), ("bias", (v,))) if draw(st.booleans()) else None
        dag.add(kind, edges, bias)
    for neuron in {len(dag.neurons) - 1, draw(st.sampled_from(range(len(dag.neurons))))}:
        dag.add_output(neuron)
    return dag


@st.composite
def nets(draw: st.DrawFn, spatial_axes: int | None = None, reuse: bool = False) -> Net:
    """Layers that read any earlier tensors; what nothing reads is an output."""
    rank = draw(st.integers(0, 2)) if spatial_axes is None else spatial_axes
    shape = {
        0: st.tuples(st.integers(1, 3)),
        1: st.tuples(st.integers(1, 2), st.integers(3, 6)),
        2: st.tuples(st.integers(1, 2), st.integers(2, 4), st.integers(2, 4)),
    }[rank]
    input_shapes = tuple(draw(shape) for _ in range(draw(st.sampled_from([1, 1, 2]))))
    shapes = [tuple(s) for s in input_shapes]
    layers: list[Layer] = []
    for _ in range(draw(st.integers(4, 8))):
        layer = draw(_layer(shapes, layers, len(input_shapes), reuse))
        built = _shape_after(layer, shapes, layers, len(input_shapes))
        if built is None:
            continue
        layers.append(layer)
        shapes.append(built)
    read = {i for layer in layers for i in layer.inputs}
    for unread in set(range(len(input_shapes))) - read:
        layers.append(Layer("relu", (unread,)))
        shapes.append(shapes[unread])
        read.add(unread)
    outputs = {i for i in range(len(shapes)) if i not in read}
    if draw(st.booleans()):
        _add_head(layers, shapes, outputs, draw(st.booleans()))
    if draw(st.integers(0, 4)) == 0:
        outputs.add(draw(st.integers(len(input_shapes), len(shapes) - 1)))
    return Net(input_shapes, tuple(layers), tuple(sorted(outputs)), draw(st.integers(0, 10**6)))


def _add_head(
    layers: list[Layer], shapes: list[tuple[int, ...]], outputs: set[int], bias: bool
) -> None:
    """Let one linear layer read everything that was an output."""
    vectors = []
    for number in sorted(outputs):
        vectors.append(number)
        if len(shapes[number]) > 1:
            layers.append(Layer("flatten", (number,)))
            shapes.append((math.prod(shapes[number]),))
            vectors[-1] = len(shapes) - 1
    layers.append(Layer("cat", tuple(vectors)))
    shapes.append((sum(shapes[i][0] for i in vectors),))
    layers.append(Layer("linear", (len(shapes) - 1,), {"out": 2, "bias": bias}))
    shapes.append((2,))
    outputs.clear()
    outputs.add(len(shapes) - 1)


@st.composite
def _layer(
    draw: st.DrawFn,
    shapes: list[tuple[int, ...]],
    layers: list[Layer],
    inputs: int,
    reuse: bool,
) -> Layer:
    # The latest tensor is the most likely to be read, so that networks get deep.
    recent = st.sampled_from([*range(len(shapes)), *[len(shapes) - 1] * 8])
    source = draw(recent)
    shape = shapes[source]
    rank = len(shape) - 1
    twins = [i for i, other in enumerate(shapes) if other == shape and i != source]
    joinable = [i for i, other in enumerate(shapes) if other[1:] == shape[1:]]
    usable = [
        inputs + i
        for i, layer in enumerate(layers)
        if _reads_like(layer, shapes[layer.inputs[0]], shape)
    ]
    choices = ["linear", "relu"]
    if rank:
        choices += ["conv", "conv", "conv", "flatten", "maxpool", "avgpool"]
    producer = layers[source - inputs].op if source >= inputs else "input"
    if producer != "batchnorm":
        choices += ["batchnorm"] * (4 if producer in ("conv", "linear") else 1)
    if twins:
        choices += ["add", "sub", "maximum"]
    if len(joinable) > 1:
        choices += ["cat"]
    norms = [number for number in usable if layers[number - inputs].op == "batchnorm"]
    if producer == "batchnorm":
        # Which of two batch norms in a row is folded is a convention of its own.
        usable = [number for number in usable if number not in norms]
    elif producer in ("conv", "linear") and norms:
        usable = norms
    if reuse and usable:
        choices = [choice for choice in choices if choice in ("relu", "batchnorm")]
        choices += ["again"] * (len(choices) + 1)
    op = draw(st.sampled_from(choices))
    if op in ("relu", "flatten", "batchnorm"):
        return Layer(op, (source,))
    if op == "linear":
        out = shape[-1] if reuse else draw(st.integers(1, 3))
        options = {"out": out, "bias": draw(st.booleans())}
        return Layer(op, (source,), options)
    if op in ("add", "sub", "maximum"):
        return Layer(op, (source, draw(st.sampled_from(twins))))
    if op == "cat":
        others = st.lists(st.sampled_from(joinable), min_size=2, max_size=3, unique=True)
        return Layer(op, tuple(draw(others)))
    if op == "again":
        used = draw(st.sampled_from(usable))
        twin = layers[used - inputs]
        return Layer(twin.op, (source,), {"use": twin.options.get("use", used), **twin.options})

    def per_axis(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    if op == "conv":
        groups = shape[0] if draw(st.booleans()) else 1
        return Layer(
            op,
            (source,),
            {
                "out": shape[0] if reuse else groups * draw(st.integers(1, 2)),
                "kernel": per_axis(1, 3),
                "stride": per_axis(1, 2),
                "padding": per_axis(0, 2),
                "dilation": per_axis(1, 2),
                "groups": groups,
                "bias": draw(st.booleans()),
            },
        )
    kernel = per_axis(1, 3)
    options = {
        "kernel": kernel,
        "stride": per_axis(1, 3),
        "padding": tuple(draw(st.integers(0, k // 2)) for k in kernel),
        "ceil": draw(st.booleans()),
    }
    if op == "maxpool":
        options["dilation"] = per_axis(1, 2)
    else:
        options["include_pad"] = draw(st.booleans())
    return Layer(op, (source,), options)


def _reads_like(layer: Layer, read: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether the module of a layer that reads `read` can also read a tensor of another shape."""
    if len(read) != len(shape):
        return False
    axis = {"linear": -1, "conv": 0, "batchnorm": 0}.get(layer.op)
    return axis is not None and read[axis] == shape[axis]


def _shape_after(
    layer: Layer, shapes: list[tuple[int, ...]], layers: list[Layer], inputs: int
) -> tuple[int, ...] | None:
    """The shape that PyTorch gives the result; None if it refuses or the net would get too big."""
    net = Net(tuple(shapes[:inputs]), (*layers, layer), (len(shapes),))
    zeros = [torch.zeros(1, *shape, dtype=torch.float64) for shape in net.input_shapes]
    try:
        made = net.module()(*zeros)
    except RuntimeError:  # the window doesn't fit
        return None
    # A maximum over nothing but padding is no neuron.
    return tuple(made.shape[1:]) if made.numel() <= 24 and made.isfinite().all() else None


def random_input(net: Net, seed: int = 0) -> tuple[list[torch.Tensor], np.ndarray]:
    """A random input: as tensors with a batch axis, and in a row."""
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=shape) for shape in net.input_shapes]
    row = np.concatenate([array.ravel() for array in arrays])
    return [torch.tensor(array)[None] for array in arrays], row


def built(net: Net) -> tuple[torch.nn.Module, Dag]:
    """The module and the graph of a net, if it is small enough."""
    module = net.module()
    dag = net.dag(module)
    assume(0 < dag.count_paths() <= MAX_PATHS)
    return module, dag


def shapes_of(net: Net) -> Any:
    """The `input_shape` argument of the package."""
    return net.input_shapes[0] if len(net.input_shapes) == 1 else list(net.input_shapes)


# The oracle ---------------------------------------------------------------------------


def assert_formula_4(dag: Dag, x: np.ndarray) -> None:
    """R_theta(x) = <Phi(theta), A(theta, x) (x, 1)>, per output neuron."""
    contributions = dag.phi() * (dag.activations(x) @ np.append(x, 1.0))
    found = np.zeros(len(dag.outputs))
    np.add.at(found, dag.ends(), contributions)
    np.testing.assert_allclose(found, dag.forward(x), rtol=1e-9, atol=1e-9)


@bounded(150)
@given(dags(), st.integers(0, 10**6))
def test_formula_4_on_random_graphs(dag: Dag, seed: int) -> None:
    assume(dag.count_paths() <= MAX_PATHS)
    x = np.random.default_rng(seed).normal(size=len(dag.inputs))
    assert_formula_4(dag, x)
    assert len(dag.paths()) == dag.count_paths()


def test_formula_4_fails_for_wrong_activations() -> None:
    dag = Dag()
    x = dag.add_input()
    dag.add_output(dag.add("relu", [(x, Weight(-1.0))]))
    assert_formula_4(dag, np.array([2.0]))
    dag.activations = lambda x: np.ones((1, 2))
    with pytest.raises(AssertionError):
        assert_formula_4(dag, np.array([2.0]))


@bounded(150)
@given(dags())
def test_definition_10_equals_11_12_and_14_on_random_graphs(dag: Dag) -> None:
    assume(dag.count_paths() <= MAX_PATHS)
    weights = [edge for neuron in dag.neurons for edge in neuron.edges]
    for coordinate in dag.coordinates():
        by_definition = dag.path_magnitude(coordinate)
        difference = dag.path_norm() - np.abs(dag.phi(without=coordinate)).sum()  # (11)
        assert difference == pytest.approx(by_definition, rel=1e-9, abs=1e-9)
        assert dag.weighted_magnitude(coordinate) == pytest.approx(by_definition, rel=1e-12)
        value = next((w.value for _, w in weights if w.coordinate == coordinate), 1.0)
        assert value != 0 or by_definition == 0


@bounded(60)
@given(nets())
def test_graph_and_module_compute_the_same_function(net: Net) -> None:
    module, dag = built(net)
    tensors, row = random_input(net)
    outputs = module(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    expected = torch.cat([output.flatten() for output in outputs]).detach().numpy()
    np.testing.assert_allclose(dag.forward(row), expected, rtol=1e-9, atol=1e-9)
    assert_formula_4(dag, row)


@bounded(60)
@given(dags(), st.sampled_from([0.5, 1, 2, 4]))
def test_path_norm_takes_one_pass_over_the_lifted_graph(dag: Dag, q: float) -> None:
    # |w|^q for w, identity for ReLU, sums for max-pooling, ones for the inputs.
    assume(dag.count_paths() <= MAX_PATHS)
    mass: list[float] = []
    for neuron in dag.neurons:
        start = (
            1.0 if neuron.kind == "input" else abs(neuron.bias.value if neuron.bias else 0.0) ** q
        )
        mass.append(start + sum(mass[u] * abs(weight.value) ** q for u, weight in neuron.edges))
    lifted = sum(mass[output] for output in dag.outputs) ** (1 / q)
    assert dag.path_norm(q) == pytest.approx(lifted, rel=1e-12, abs=0)


def test_one_hidden_layer_by_hand() -> None:
    # Phi = (v_i u_ij, v_i b_i, c): the example of section 2.2, with biases.
    u, b, v, c = [[2.0, -3.0], [0.0, 5.0]], [0.5, -1.0], [7.0, -11.0], -13.0
    dag = Dag()
    dag.shapes = {"u": (2, 2), "b": (2,), "v": (2,), "c": ()}
    x = [dag.add_input(), dag.add_input()]
    hidden = [
        dag.add(
            "relu",
            [(x[j], Weight(u[i][j], ("u", (i, j)))) for j in range(2)],
            Weight(b[i], ("b", (i,))),
        )
        for i in range(2)
    ]
    last = [(hidden[i], Weight(v[i], ("v", (i,)))) for i in range(2)]
    dag.add_output(dag.add("identity", last, Weight(c, ("c", ()))))
    assert sorted(dag.phi()) == sorted([14.0, -21.0, 3.5, 0.0, -55.0, 11.0, -13.0])
    assert dag.path_norm() == 117.5
    assert dag.path_norm(0) == 6
    assert dag.path_norm(2) == pytest.approx(math.sqrt(3964.25))
    assert dag.path_magnitude(("u", (0, 1))) == 21
    assert dag.path_magnitude(("b", (1,))) == 11
    assert dag.path_magnitude(("v", (0,))) == 38.5
    assert dag.path_magnitude(("c", ())) == 13
    assert dag.path_magnitude(("u", (1, 0))) == 0


def test_pool_neurons_by_hand() -> None:
    dag = Dag()
    x = [dag.add_input() for _ in range(3)]
    dag.add_output(dag.add("pool", [(u, ONE) for u in x], k=2))
    assert dag.forward([3.0, 1.0, 2.0]) == [2.0]
    # Among equals the first antecedent counts.
    assert dag.activations([2.0, 2.0, 1.0])[:, :3].diagonal().tolist() == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="weight 1"):
        dag.add("pool", [(x[0], Weight(2.0))])


def test_a_coordinate_taken_twice_counts_twice_in_14_only() -> None:
    layer = {"out": 1, "bias": False}
    net = Net(
        ((1,),), (Layer("linear", (0,), layer), Layer("linear", (1,), {"use": 1, **layer})), (2,)
    )
    module = net.module()
    module.op1.weight.data.fill_(3.0)
    dag = net.dag(module)
    assert dag.takes_a_coordinate_twice()
    assert dag.path_norm() == 9
    assert dag.path_magnitude(("op1.weight", (0, 0))) == 9
    assert dag.weighted_magnitude(("op1.weight", (0, 0))) == 18


def test_comparison_notices_differences() -> None:
    expected = {"w": np.array([0.25, 0.0])}
    assert_same_shares({"w": torch.tensor([0.25, 0.0])}, expected)
    for wrong in (
        {"w": torch.tensor([0.2501, 0.0])},
        {"w": torch.tensor([0.25, 1e-300], dtype=torch.float64)},
        {"w": torch.tensor([0.25, math.nan])},
        {"w": torch.tensor([[0.25, 0.0]])},
        {"v": torch.tensor([0.25, 0.0])},
        {},
    ):
        with pytest.raises(AssertionError):
            assert_same_shares(wrong, expected)


# The package against the oracle -------------------------------------------------------


@bounded(30)
@given(nets())
def test_path_norms_equal_enumeration(net: Net) -> None:
    module, dag = built(net)
    norms = fxpath.path_norms(module, shapes_of(net), q=EXPONENTS)
    assert norms == {q: pytest.approx(dag.path_norm(q), rel=1e-9, abs=0) for q in EXPONENTS}


def assert_scores_equal_enumeration(net: Net) -> None:
    """Path-norm and the share of every coordinate, and no score for anything else."""
    module, dag = built(net)
    assume(not dag.takes_a_coordinate_twice())
    analysis = fxpath.analyze(module, shapes_of(net), dtype=torch.float64)
    assert analysis.path_norm == pytest.approx(dag.path_norm(), rel=1e-9, abs=0)
    assert_same_shares(analysis.scores, dag.shares())
    unscored = {name for name, _ in module.named_parameters()} - analysis.scores.keys()
    assert analysis.unscored.keys() == unscored
    assert all("part of" in r or r == "slope" for r in analysis.unscored.values())


@bounded(30)
@given(nets(spatial_axes=0))
def test_scores_equal_enumeration_on_dense_nets(net: Net) -> None:
    assert_scores_equal_enumeration(net)


@bounded(30)
@given(nets(spatial_axes=1))
def test_scores_equal_enumeration_in_one_dimension(net: Net) -> None:
    assert_scores_equal_enumeration(net)


@bounded(30)
@given(nets(spatial_axes=2))
def test_scores_equal_enumeration_in_two_dimensions(net: Net) -> None:
    assert_scores_equal_enumeration(net)


def _reusing(net: Net) -> bool:
    return any("use" in layer.options for layer in net.layers)


SHARED_NORM = Net(
    ((2, 4),),
    (
        Layer("conv", (0,), {"out": 2, "kernel": (3,), "padding": (1,), "bias": True}),
        Layer("batchnorm", (1,)),
        Layer("relu", (2,)),
        Layer("conv", (3,), {"use": 1, "out": 2, "kernel": (3,), "padding": (1,), "bias": True}),
        Layer("batchnorm", (4,), {"use": 2}),
        Layer("linear", (5,), {"out": 2, "bias": False}),
        Layer("batchnorm", (6,), {"use": 2}),
    ),
    (7,),
)


@bounded(25)
@given(nets(reuse=True).filter(_reusing))
@example(SHARED_NORM)
def test_a_reused_weight_counts_each_time_a_path_takes_it(net: Net) -> None:
    module, dag = built(net)
    analysis = fxpath.analyze(module, shapes_of(net), dtype=torch.float64)
    assert analysis.path_norm == pytest.approx(dag.path_norm(), rel=1e-9, abs=0)
    assert_same_shares(analysis.scores, dag.shares(weighted=True))
