"""Certificates that travel: what they say, that files carry them, and what makes them not hold.

The oracle lists the paths of a small network and adds them up in fractions, so that what a claim
says of exact arithmetic is compared with exact arithmetic.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fxpath
from fxpath.certificate import above, below
from fxpath_command import main
from tests.support.command_line import fails, seeded_mlp
from tests.support.nets import randomize


def mlp(seed: int = 0) -> nn.Module:
    return randomize(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), seed, weights=True)


def paths(model: nn.Module) -> dict[tuple[Any, ...], Fraction]:
    """Every path of such a network, and the product along it."""
    state = {name: value.tolist() for name, value in model.state_dict().items()}
    found: dict[tuple[Any, ...], Fraction] = {}
    for k, row in enumerate(state["2.weight"]):
        found[(k,)] = Fraction(state["2.bias"][k])
        for j, outer in enumerate(row):
            found[j, k] = Fraction(outer) * Fraction(state["0.bias"][j])
            for i, inner in enumerate(state["0.weight"][j]):
                found[i, j, k] = Fraction(outer) * Fraction(inner)
    return found


def distance(first: nn.Module, second: nn.Module) -> Fraction:
    a, b = paths(first), paths(second)
    return sum((abs(a[path] - b[path]) for path in a), Fraction())


def halved(model: nn.Module) -> nn.Module:
    """Another network that the first one dominates."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight[0] /= 2
        other[2].weight[1, 1] = 0
    return other


def by_hand(state: dict[str, Tensor]) -> str:
    """The SHA-256 that the documentation describes, from the bytes that numpy sees."""
    text = b""
    for name in sorted(state):
        array = state[name].numpy()
        text += f"{name} torch.{array.dtype} {tuple(array.shape)}\n".encode() + array.tobytes()
    return hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize("pair", ["dominated", "any"])
def test_a_claim_holds_in_exact_arithmetic(pair: str) -> None:
    model = mlp()
    other = halved(model) if pair == "dominated" else mlp(1)
    certificate = fxpath.certify(other, reference=model)
    claim, true = certificate.claim, distance(model, other)
    assert claim is not None
    assert Fraction(claim.lower) <= true <= Fraction(claim.upper)
    norm, left = (sum(map(abs, paths(each).values())) for each in (model, other))
    assert claim.relative is not None and true / norm <= Fraction(claim.relative)
    assert claim.path_norm == pytest.approx(float(norm), rel=1e-8)
    assert certificate.path_norm == pytest.approx(
        float(sum(map(abs, paths(other).values()))), rel=1e-8
    )
    assert claim.exact == (pair == "dominated")
    if claim.exact:
        assert claim.inequality == "(7)"
        assert claim.value == pytest.approx(float(true), rel=1e-8)
        assert claim.upper - claim.lower <= 4e-9 * claim.upper
    else:
        assert claim.value is None
        assert claim.upper >= fxpath.path_metric(other, model).bound(claim.inequality)
    assert claim.weights == by_hand(model.state_dict())
    assert certificate.weights == by_hand(other.state_dict())
    assert fxpath.verify(certificate, other, reference=model) == []


def test_what_it_says_of_one_set_of_weights() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten())
    model = nn.Sequential(model, nn.Linear(8, 2))
    certificate = fxpath.certify(randomize(model, weights=True), (1, 3, 3), q=2, until="0")
    analysis = fxpath.analyze(model, (1, 3, 3), q=2, until="0")
    assert certificate.path_norm == pytest.approx(analysis.path_norm, rel=1e-6)
    assert (certificate.q, certificate.until, certificate.inputs) == (2, "0", {"input": (1, 3, 3)})
    # What is not read is no part of it: the head, and the counter of the batch norm.
    norm = ("bias", "running_mean", "running_var", "weight")
    assert certificate.tensors == ("0.0.bias", "0.0.weight", *(f"0.1.{name}" for name in norm))
    rows = [(row["name"], row["shape"], row["share"]) for row in certificate.layers]
    for row, (name, shape, share) in zip(analysis.layers, rows, strict=True):
        assert (row["name"], row["shape"]) == (name, shape)
        assert row["share"] == pytest.approx(share, rel=1e-5)
    assert fxpath.verify(certificate, model) == []
    with torch.no_grad():
        model[1].weight.add_(1)
    assert fxpath.verify(certificate, model) == []


@pytest.mark.parametrize("value", [1 / 3, 123456789.00000001, 1e-300, 7.0, 0.0, 0.1 + 0.2])
def test_numbers_are_rounded_outwards(value: float) -> None:
    assert below(value) <= value <= above(value)
    assert math.isclose(below(value), above(value), rel_tol=1.1e-8)


def test_what_was_changed_is_named() -> None:
    model, certificate = mlp(), fxpath.certify(halved(mlp()), reference=mlp())
    other, claim = halved(model), certificate.claim
    assert claim is not None and claim.relative is not None

    def found(changed: fxpath.Claim, **rest: Any) -> list[str]:
        said = dataclasses.replace(certificate, claim=changed, **rest)
        return fxpath.verify(said, other, reference=model)

    assert found(claim) == []
    # Whatever is claimed beyond what holds.
    boast = dataclasses.replace(
        claim,
        upper=math.nextafter(claim.lower, 0.0),
        lower=math.nextafter(claim.upper, math.inf),
        relative=0.999999 * claim.relative,
        weights="0" * 64,
        value=2 * claim.upper,
    )
    first, *rest = certificate.layers
    lines = found(
        boast,
        weights="0" * 64,
        path_norm=1.0,
        tensors=("0.weight",),
        layers=({**first, "share": 0.5}, *rest[1:]),
    )
    for said in (
        "certified is at most",
        "certified is at least",
        "relative to the reference",
        "the reference is another",
        "value of the claim",
        "the weights are others",
        "path_norm is",
        "the network reads",
        "share of layer 0",
        "of layer 2 is",
    ):
        assert any(said in line for line in lines), (said, lines)
    # A weaker claim holds too.
    weaker = dataclasses.replace(claim, upper=2 * claim.upper, lower=0.0, relative=1.0)
    assert found(weaker) == []


def test_exactness_is_not_taken_on_trust() -> None:
    model, other = mlp(), mlp(1)
    certificate = fxpath.certify(other, reference=model)
    assert certificate.claim is not None
    boast = dataclasses.replace(
        certificate, claim=dataclasses.replace(certificate.claim, exact=True)
    )
    assert "the path-metric is not exact, certified it is" in fxpath.verify(
        boast, other, reference=model
    )


def test_weights_that_differ_by_one_bit_are_others() -> None:
    model = mlp()
    certificate = fxpath.certify(model)
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nextafter(model[0].weight[0, 0], torch.tensor(9.0))
    line = fxpath.verify(certificate, model)[0]
    assert "SHA-256" in line and certificate.weights in line


def test_a_reference_is_asked_for_where_there_is_a_claim_and_only_there() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="pass reference="):
        fxpath.verify(fxpath.certify(halved(model), reference=model), halved(model))
    with pytest.raises(ValueError, match="leave it out"):
        fxpath.verify(fxpath.certify(model), model, reference=model)


def test_slopes_are_no_weights() -> None:
    first, second = (nn.Sequential(nn.Linear(2, 2), nn.PReLU(init=s)) for s in (0.1, 0.2))
    with pytest.raises(ValueError, match=r"1\.weight differ"):
        fxpath.certify(first, reference=second)


# -- in files --------------------------------------------------------------------------------------


def test_masks_and_pruned_weights_carry_it(tmp_path: Path) -> None:
    model = mlp()
    pruned = fxpath.prune(model, 0.5)
    pruned.save(tmp_path / "masks.safetensors")
    certificate = fxpath.load_certificate(tmp_path / "masks.safetensors")
    assert certificate == pruned.record()
    assert certificate.claim is not None and certificate.claim.exact
    true = distance(model, pruned.model())
    assert Fraction(certificate.claim.lower) <= true <= Fraction(certificate.claim.upper)
    assert fxpath.load_masks(tmp_path / "masks.safetensors").keys() == pruned.masks.keys()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.bin", b"", "certificates travel in .pt2, .onnx, .safetensors, .json"),
        ("a.json", b"[1]", "its format is None"),
        ("a.json", b'{"format": "fxpath.certificate/2"}', "'fxpath.certificate/2' and not"),
        ("a.json", b'{"format": "fxpath.certificate/1", "claim": null}', "although it says so"),
        ("a.json", b"\xff\xfe", "cannot be read"),
        ("a.pt2", b"no archive", "cannot be read"),
        ("a.safetensors", b"no tensors", "cannot be read"),
    ],
)
def test_files_without_one_are_refused(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        fxpath.load_certificate(tmp_path / name)


def test_weights_alone_carry_none(tmp_path: Path) -> None:
    save_file(mlp().state_dict(), tmp_path / "a.safetensors")
    torch.export.save(torch.export.export(mlp(), (torch.ones(1, 3),)), tmp_path / "a.pt2")
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match="holds no certificate, an entry fxpath.json"):
            fxpath.load_certificate(path)


# -- on the command line ---------------------------------------------------------------------------


def test_pruned_weights_are_verified(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "some_nets:mlp", "--amount", "0.5", "-o", "out.safetensors"]) == 0
    command = ["verify", "some_nets:mlp", "out.safetensors"]
    assert main(command) == 0
    assert "holds                         yes" in capsys.readouterr().out

    with safe_open(nets / "out.safetensors", "pt") as file:
        metadata = file.metadata()
    state = load_file(nets / "out.safetensors")
    state["0.weight"][0, 0] += 1
    save_file(state, nets / "out.safetensors", metadata)
    assert main(command) == 1
    out = capsys.readouterr().out
    assert "holds                         no" in out and "the weights are others" in out

    said = json.loads(metadata["fxpath.json"])
    said["claim"]["upper"] = said["claim"]["lower"] / 2
    state["0.weight"][0, 0] -= 1
    boast = {**metadata, "fxpath.json": json.dumps(said)}
    pruned = fxpath.prune(seeded_mlp(nets), 0.5, (4,)).state_dict
    save_file(pruned, nets / "out.safetensors", boast)
    assert main(command) == 1
    assert "certified is at most" in capsys.readouterr().out
    lacking = {n: t for n, t in pruned.items() if n != "2.bias"}  # the model's own would do
    save_file(lacking, nets / "out.safetensors", metadata)
    assert "lacks 2.bias" in fails(capsys, *command)
    # As the reference, another model.
    assert main(["verify", "some_nets:huge", "out.safetensors"]) == 2
    # In another format they are the same weights, unless this one tells numbers apart.
    wide = {name: tensor.double() for name, tensor in pruned.items()}
    save_file(wide, nets / "out.safetensors", metadata)
    assert main(command) == 0
    capsys.readouterr()
    wide["0.weight"] *= 1 + 2.0**-40
    save_file(wide, nets / "out.safetensors", metadata)
    assert "does not hold all of its entries" in fails(capsys, *command)


def test_masks_are_verified(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fxpath.prune(seeded_mlp(nets), 0.5, (4,)).save(nets / "masks.safetensors")
    assert main(["verify", "some_nets:mlp", "masks.safetensors"]) == 0
    assert "exact" in capsys.readouterr().out


def test_a_program_is_exported_and_verified(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "some_nets:mlp", "-o", "net.pt2", "--norm-only"]) == 0
    out = capsys.readouterr().out
    model = seeded_mlp(nets)
    assert by_hand(model.state_dict()) in out and f"{fxpath.path_norm(model, (4,)):.6g}" in out
    found = torch.export.load(nets / "net.pt2").module()()
    assert found.keys() == {"mantissa", "exponent", "smallest"}
    assert main(["verify", "some_nets:mlp", "net.pt2"]) == 0
    torch.save(mlp_with(model, 2.0).state_dict(), nets / "other.pt")
    command = ["verify", "some_nets:mlp", "net.pt2", "--checkpoint", "other.pt"]
    assert main(command) == 1
    assert "the weights are others" in capsys.readouterr().out


def mlp_with(model: nn.Module, factor: float) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight *= factor
    return other


def test_a_bound_is_a_gate(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = seeded_mlp(nets)
    torch.save(mlp_with(model, 0.5).state_dict(), nets / "other.pt")
    metric = fxpath.path_metric(model, mlp_with(model, 0.5), (4,))
    bound = fxpath.lipschitz_bound(model, mlp_with(model, 0.5), (4,), radius=3.0)
    command = ["bound", "some_nets:mlp", "other.pt", "--radius", "3"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert str(metric) in out and f"{bound.value:g}" in out
    assert out.startswith("some_nets:mlp (its own weights) and other.pt\n")
    # A file that is there counts, whatever it is called.
    (again := nets / "epoch.pth.tar").write_bytes((nets / "other.pt").read_bytes())
    assert main(["bound", "some_nets:mlp", str(again), "--radius", "3"]) == 0
    assert str(metric) in capsys.readouterr().out
    assert main([*command, "--max-relative", str(metric.relative_upper)]) == 0
    assert "within" in capsys.readouterr().out
    less = math.nextafter(metric.relative_upper, 0.0)
    assert main([*command, "--max-relative", str(less)]) == 1
    assert "beyond" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["export", "some_nets:mlp", "-o", "net.bin"], "kind='exported' as FILE.pt2"),
        (["export", "some_nets:mlp", "-o", "nowhere/net.pt2"], "no such directory"),
        (["verify", "some_nets:mlp", "nowhere.pt2"], "no such file"),
        (["bound", "some_nets:mlp", "nowhere.pt"], "OTHER nowhere.pt: no such file"),
        (["bound", "some_nets:mlp", "some_nets:mlp", "--max-relative", "-1"], "not below 0"),
    ],
)
def test_what_is_wrong_is_one_line(
    nets: Path, capsys: pytest.CaptureFixture[str], command: list[str], said: str
) -> None:
    assert said in fails(capsys, *command)
