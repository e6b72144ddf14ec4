"""Comparisons that several tests share: analyses, derivatives, and a model before and after."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fxpath


def assert_equal_analyses(
    actual: fxpath.Analysis, expected: fxpath.Analysis, rtol: float = 1e-5, prefix: str = ""
) -> None:
    """Same path-norm, same names, same shares; a share of 0 has to be 0 in both."""
    difference = abs(actual.log10_path_norm - expected.log10_path_norm)
    assert difference <= rtol / math.log(10), f"log10 of the path-norms differ by {difference}"
    assert set(actual.scores) == {prefix + name for name in expected.scores}
    for name, wanted in expected.scores.items():
        got = actual.scores[prefix + name].double()
        assert got.shape == wanted.shape, name
        worst = ((got - wanted.double()).abs() - rtol * wanted.double().abs()).max()
        assert worst <= 0, f"{name}: off by {worst} more than {rtol} relative"


def relative_derivative(model: nn.Module, shape: Any, parameter: Tensor, index: Any) -> float:
    """theta_i d||Phi||_1/d theta_i by a central difference of fourth order."""
    norms = {}
    value = parameter.detach()[index].clone()
    for step in (-2, -1, 1, 2):
        with torch.no_grad():
            parameter[index] = value * (1 + step * 1e-3)
        norms[step] = fxpath.path_norm(model, shape)
    with torch.no_grad():
        parameter[index] = value
    return (8 * (norms[1] - norms[-1]) - (norms[2] - norms[-2])) / 12e-3


# The model is left alone --------------------------------------------------------------


def bits(tensor: Tensor) -> bytes:
    """The content of a tensor; unlike `torch.equal` this tells -0.0 from 0.0 and knows NaN."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def describe_tensor(tensor: Tensor) -> tuple[Any, ...]:
    grad = None if tensor.grad_fn is not None else tensor.grad
    return (
        id(tensor),
        tensor.data_ptr(),
        tensor._version,
        tensor.requires_grad,
        tuple(tensor.shape),
        tensor.dtype,
        bits(tensor),
        None if grad is None else (id(grad), bits(grad)),
    )


def describe_value(value: Any) -> Any:
    """A module attribute by identity and content."""
    if isinstance(value, Tensor):
        return describe_tensor(value)
    if isinstance(value, dict):  # parameters, buffers, submodules, all kinds of hooks
        return id(value), [(key, describe_value(item)) for key, item in value.items()]
    if isinstance(value, (bool, int, float, str, tuple, type(None))):
        return value
    return id(value)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that an analysis could change, down to single attributes of every module."""
    state: dict[str, Any] = {
        f"{name}.{key}": describe_value(value)
        for name, module in model.named_modules(remove_duplicate=False)
        for key, value in vars(module).items()
    }
    state["classes"] = [type(module) for module in model.modules()]
    state["torch rng"] = bits(torch.get_rng_state())
    state["numpy rng"] = repr(np.random.get_state(legacy=False)["state"])
    state["python rng"] = random.getstate()
    state["grad mode"] = torch.is_grad_enabled(), torch.get_default_dtype()
    state["threads"] = torch.get_num_threads()
    return state


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [key for key in {**before, **after} if before.get(key) != after.get(key)]
