"""Certificates from anywhere: what is no certificate is refused by name, and never holds."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpath
from fxpath.capture.loading.certificates import stored_tensors
from fxpath.certificate import Certificate
from tests.support.nets import randomize


def mlp(seed: int = 0) -> nn.Module:
    return randomize(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), seed, weights=True)


@cache
def certified() -> Certificate:
    return fxpath.certify(mlp(), reference=mlp(1))


def written(change: Callable[[dict[str, Any]], object]) -> str:
    data = json.loads(certified().to_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["claim"].update(upper="inf"), r"claim\.upper is 'inf', not a number"),
        (lambda d: d["claim"].update(upper=float("inf")), "Infinity is no number of JSON"),
        (lambda d: d["claim"].update(lower=None), r"claim\.lower is None"),
        (lambda d: d["claim"].update(relative=[1]), r"claim\.relative is \[1\]"),
        (lambda d: d["claim"].update(path_norm=10**400), r"claim\.path_norm is 1000"),
        (lambda d: d["claim"].update(exact=1), r"claim\.exact is 1, not true or false"),
        (lambda d: d["claim"].pop("upper"), r"claim\.upper is missing"),
        (lambda d: d.update(q="1"), "q is '1', not a number"),
        (lambda d: d.update(q=True), "q is True"),
        (lambda d: d.update(batch_dim="x"), "batch_dim is 'x', not an axis or null"),
        (lambda d: d.update(until=[1]), r"until is \[1\]"),
        (lambda d: d.update(tensors=[1]), "not a list of names"),
        (lambda d: d.update(inputs={"input": "3"}), "not a list of lengths for each name"),
        (lambda d: d.update(versions=3), "versions is 3"),
        (lambda d: d.update(extra=1), "extra is not known"),
        (lambda d: d["layers"][0].update(name={}), r"layers\[0\]\.name is {}"),
        (lambda d: d["layers"][1].update(share=10**400), r"layers\[1\]\.share"),
        (lambda d: d["layers"].insert(0, {**d["layers"][1], "share": 0.1}), "two rows for 2"),
    ],
)
def test_entries_of_another_kind_are_named(
    change: Callable[[dict[str, Any]], object], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        Certificate.from_json(written(change))


@pytest.mark.parametrize(
    ("instead", "said"),
    [
        ('"q": ' + "[" * 100_000, "nested deeper"),
        ('"q": 2.0, "q": 1.0', "'q' occurs twice"),
        ('"q": NaN', "NaN is no number"),
        ('"q": 1e999', "q is inf, not a number"),
    ],
)
def test_texts_that_readers_do_not_agree_about_are_refused(instead: str, said: str) -> None:
    text = certified().to_json()
    assert '"q": 1.0' in text
    with pytest.raises(ValueError, match=said):
        Certificate.from_json(text.replace('"q": 1.0', instead))


def test_what_a_bound_is_by_is_not_taken_on_trust() -> None:
    said, claim = certified(), certified().claim
    assert claim is not None and not claim.exact
    assert fxpath.verify(said, mlp(), reference=mlp(1)) == []
    for name in ("trust me", "(7)", "m"):  # the last one changes when a network is rescaled
        boast = dataclasses.replace(said, claim=dataclasses.replace(claim, inequality=name))
        (line,) = fxpath.verify(boast, mlp(), reference=mlp(1))
        assert line.startswith(f"{name} does not say")
    # Another bound than the least says something true as far as it goes.
    values = fxpath.path_metric(mlp(), mlp(1))
    weaker = max(("theorem_f2", "lemma_3_3", "m_normalized"), key=values.bound)
    named = dataclasses.replace(claim, inequality=weaker)
    assert len(fxpath.verify(dataclasses.replace(said, claim=named), mlp(), reference=mlp(1))) == 1
    true = dataclasses.replace(named, upper=2 * values.bound(weaker))
    assert fxpath.verify(dataclasses.replace(said, claim=true), mlp(), reference=mlp(1)) == []


class ByName(nn.Linear):
    """A layer that takes its input by name alone."""

    def forward(self, *, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class Second(nn.Linear):
    """A layer whose first input may be left out."""

    def forward(self, skip: Tensor | None = None, x: Tensor | None = None) -> Tensor:  # type: ignore[override]
        assert x is not None
        return super().forward(x) if skip is None else super().forward(x) + skip


class AnyName(nn.Linear):
    """A layer that takes whatever it is given by name."""

    def forward(self, **given: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(given["x"])


class AnyNumber(nn.Linear):
    """A layer whose inputs have no names of their own."""

    def forward(self, *given: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(given[0]) + given[1]


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        (ByName, {"x": (2,)}),
        (Second, {"x": (2,)}),
        (AnyName, {"x": (2,)}),
        (AnyNumber, [(2,), (3,)]),
    ],
)
def test_inputs_are_verified_by_the_names_that_they_have(
    kind: type[nn.Linear], shapes: Any
) -> None:
    model = kind(2, 3)
    assert fxpath.verify(fxpath.certify(model, shapes), model) == []


def test_an_input_that_hooks_take_by_its_place_is_verified() -> None:
    model = nn.Linear(2, 3)
    model.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    assert fxpath.verify(fxpath.certify(model), model) == []


def test_a_quotient_beyond_float64_is_none() -> None:
    one, other = (nn.Linear(1, 1, bias=False, dtype=torch.float64) for _ in range(2))
    nn.init.constant_(one.weight, 1e200)
    nn.init.constant_(other.weight, 1e-200)
    claim = fxpath.certify(one, reference=other).claim
    assert claim is not None and claim.relative is None and claim.upper >= 1e200


def archive(path: Path, members: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, text in members.items():
            file.writestr(name, text)
    return path


def test_a_member_of_another_folder_is_no_certificate(tmp_path: Path) -> None:
    text = certified().to_json()
    other = text.replace('"q": 1.0', '"q": 2.0')
    own = {"net/notextra/fxpath.json": other, "net/extra/fxpath.json": text}
    assert fxpath.load_certificate(archive(tmp_path / "a.pt2", own)).q == 1
    two = {"a/extra/fxpath.json": other, "net/extra/fxpath.json": text}
    with pytest.raises(ValueError, match="two members extra/fxpath.json"):
        fxpath.load_certificate(archive(tmp_path / "b.pt2", two))


@pytest.mark.parametrize(("offset", "value"), [(8, 1), (10, 99)])  # encrypted; unknown compression
def test_a_member_that_cannot_be_unpacked(tmp_path: Path, offset: int, value: int) -> None:
    path = archive(tmp_path / "a.pt2", {"net/extra/fxpath.json": certified().to_json()})
    data = bytearray(path.read_bytes())
    data[data.find(b"PK\x01\x02") + offset] = data[offset - 2] = value
    path.write_bytes(data)
    with pytest.raises(ValueError, match="cannot be read"):
        fxpath.load_certificate(path)


def onnx_file(path: Path, *tensors: Any, entries: int = 1) -> Path:
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "graph", [], [], list(tensors))
    model = onnx.helper.make_model(graph)
    for _ in range(entries):
        entry = model.metadata_props.add()
        entry.key, entry.value = "fxpath.json", certified().to_json()
    path.write_bytes(model.SerializeToString())
    return path


def test_tensors_of_an_onnx_file(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    raw = torch.randn(2, 3).bfloat16()
    bytes_ = raw.view(torch.uint8).numpy().tobytes()
    half = onnx.helper.make_tensor("w", onnx.TensorProto.BFLOAT16, [2, 3], bytes_, raw=True)
    found = stored_tensors(onnx_file(tmp_path / "a.onnx", half))
    assert found is not None and found["w"].dtype == raw.dtype and torch.equal(found["w"], raw)

    with pytest.raises(fxpath.capture.loading.UsageError, match="two initializers w"):
        stored_tensors(onnx_file(tmp_path / "b.onnx", half, half))
    outside = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [1], [1.0])
    outside.ClearField("float_data")
    outside.data_location = onnx.TensorProto.EXTERNAL
    entry = outside.external_data.add()
    entry.key, entry.value = "location", "../secret"
    (tmp_path.parent / "secret").write_bytes(bytes(4))
    with pytest.raises(fxpath.capture.loading.UsageError, match="cannot be read"):
        stored_tensors(onnx_file(tmp_path / "c.onnx", outside))
    with pytest.raises(ValueError, match=r"two entries fxpath\.json"):
        fxpath.load_certificate(onnx_file(tmp_path / "d.onnx", half, entries=2))


def test_layers_without_neurons_have_a_metric() -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(2, 0), nn.Linear(0, 2))
    nn.init.constant_(model[1].bias, 1.0)
    claim = fxpath.certify(model, reference=model).claim
    assert claim is not None and claim.exact and claim.upper == 0 and claim.path_norm == 2
