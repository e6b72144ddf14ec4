"""Random networks for hypothesis: single neurons, and layers that read any earlier ones."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st

from tests.oracles.enumeration import ONE, Dag, Weight
from tests.oracles.layers import Layer
from tests.oracles.networks import Net

MAX_PATHS = 4000


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
