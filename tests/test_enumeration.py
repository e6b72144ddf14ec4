"""Path-norms and scores against paths listed one by one (Def. A.5) on small random networks.

The first half makes sure of the oracle itself: formula (4), agreement with PyTorch, and formulas
(10) to (12) and (14). The second half holds the package against it.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

import fxpath
from tests.oracles.enumeration import ONE, Dag, Weight, assert_same_shares
from tests.oracles.layers import Layer
from tests.oracles.networks import Net
from tests.support.generated import MAX_PATHS, bounded, built, dags, nets, random_input, shapes_of

EXPONENTS = (0, 0.5, 1, 2, 4)


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
