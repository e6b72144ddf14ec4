"""What people read of networks with gates: names, lists, refusals, the command line."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxpath
from fxpath import Gate
from fxpath.passes import Captured, Given, capture
from fxpath_command.parser import parse
from tests.test_cli import main

SHAPE = (3, 6, 6)
GENERALISED = "generalised path-norm"


class Excited(nn.Module):
    """A squeeze and excitation, whose gate holds a group norm if it is asked to."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.squeeze, self.inside = nn.Conv2d(4, 2, 1), inside
        self.excite = nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.excite(self.inside(self.squeeze(x.mean((2, 3), keepdim=True))))
        return x * (2 * torch.sigmoid(gate))


def net(inside: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ELU(1.5),
        Excited(inside or nn.SiLU()),
        nn.Conv2d(4, 4, 1),
        nn.GLU(1),
        nn.Flatten(),
        nn.Linear(32, 2),
    )


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def smooth() -> nn.Sequential:
    """The same with SiLU in the place of ReLU."""
    model = plain()
    model[1] = nn.SiLU()
    return model


def scaled() -> nn.Sequential:
    """The same as :func:`smooth`, with other weights."""
    model = smooth()
    with torch.no_grad():
        model[0].weight.mul_(0.9)
    return model


@pytest.fixture(scope="module")
def program() -> fxpath.PathProgram:
    return fxpath.compile(net(), SHAPE, gates=True, backend="eager")


@pytest.fixture(scope="module")
def analysis() -> fxpath.Analysis:
    return fxpath.analyze(net(), SHAPE, gates=True)


# -- results ---------------------------------------------------------------------------------------


def test_gates_are_listed_as_data(analysis: fxpath.Analysis) -> None:
    elu, mul, glu = analysis.gates
    assert (elu.operation, elu.module_path, elu.size) == ("aten.elu.default", "1", 1.5)
    assert (elu.signal, elu.factor, elu.followed) == ("", "", True)
    assert (mul.called, mul.module_path, mul.size) == ("mul", "2", 2.0)
    # The factor is the double of a sigmoid.
    assert mul.signal == "elu in 1" and mul.factor == "sigmoid in 2"
    assert mul.source_line.endswith("return x * (2 * torch.sigmoid(gate))")
    assert (glu.module_path, glu.signal, glu.factor) == ("4", "conv2d_3 in 3", "sigmoid")
    # The SiLU inside the gate is on no path.
    assert "silu" not in {gate.called for gate in analysis.gates}


def test_the_factor_that_is_taken_is_named() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.a(x)).unsqueeze(1) * self.b(x).sigmoid().unsqueeze(1)

    tanh, mul = fxpath.analyze(Cell(), (3,), gates=True).gates
    assert (tanh.called, mul.signal, mul.factor) == ("tanh", "tanh", "sigmoid")


def test_every_result_says_generalised(
    analysis: fxpath.Analysis, program: fxpath.PathProgram, tmp_path: Path
) -> None:
    analysis.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    texts = [str(analysis), repr(analysis), analysis._repr_html_(), repr(program)]
    texts += [analysis.table().title, analysis.report()["title"], page]
    for text in texts:
        assert GENERALISED in text
        assert text.count("path-norm") == text.count(GENERALISED)
    assert "Gates on the paths" in page and "torch.sigmoid(gate)" in page
    data = analysis.to_dict()
    assert data["norm"] == GENERALISED and data["gates"][1]["signal"] == "elu in 1"
    assert json.loads(analysis.to_json()) == json.loads(json.dumps(data))
    said = str(analysis)
    assert "gates: elu of size 1.5, mul by sigmoid of size 2, glu by sigmoid" in said
    assert "|outputs|_1 <= this norm * max(1, |x|_inf)" in said.replace("\n", " ")


@torch.no_grad()
def test_the_bound_that_is_said_holds(analysis: fxpath.Analysis) -> None:
    model = net()
    for seed in range(20):
        torch.manual_seed(seed)
        x = torch.randn(1, *SHAPE) * 10 ** torch.empty(1).uniform_(-2, 3).item()
        most = analysis.path_norm * max(1.0, float(x.abs().max()))
        assert float(model(x).abs().sum()) <= most


def test_other_exponents_do_not_claim_the_bound() -> None:
    said = str(fxpath.analyze(smooth(), gates=True, q=2))
    assert f"l^2 {GENERALISED}" in said and "|outputs|_1" not in said


def test_a_network_of_relus_has_an_ordinary_path_norm() -> None:
    with_gates, without = fxpath.analyze(plain(), gates=True), fxpath.analyze(plain())
    assert with_gates.gates == () and with_gates.to_dict() == without.to_dict()
    assert str(with_gates) == str(without) and without.to_dict()["norm"] == "path-norm"
    report = fxpath.check(plain(), gates=True)
    assert report.gates == () and str(report) == str(fxpath.check(plain()))


def test_what_only_gates_read_is_unscored(analysis: fxpath.Analysis) -> None:
    inside = {f"2.{name}.{kind}" for name in ("squeeze", "excite") for kind in ("weight", "bias")}
    gated = {n for n, reason in analysis.unscored.items() if reason.startswith("inside a gate")}
    assert gated == inside


def test_dead_channels_are_not_called_removable(analysis: fxpath.Analysis) -> None:
    # The second half of what a GLU reads is a gate, and on no path.
    (dead,) = [finding for finding in analysis.findings if finding.kind == "dead_channels"]
    assert dead.layers == ("3",) and dead.values == (2.0,)
    assert "remove_dead" not in dead.text and "gate may read them" in dead.text


def test_values_that_are_not_followed_are_said() -> None:
    model = net(nn.GroupNorm(1, 2))
    found = fxpath.analyze(model, SHAPE, gates=True)
    assert [gate.followed for gate in found.gates] == [True, False, True]
    assert "the values of 1 are not followed" in found.gates_line()


def test_copies_and_pickles(analysis: fxpath.Analysis, program: fxpath.PathProgram) -> None:
    for other in (copy.deepcopy(analysis), pickle.loads(pickle.dumps(analysis))):
        assert other.gates == analysis.gates and str(other) == str(analysis)
    again = copy.deepcopy(program)
    assert again.gates == program.gates and again.path_norm() == program.path_norm()
    assert program.with_exponent(2).gates == program.gates
    assert all(isinstance(gate, Gate) for gate in again.gates)


def test_exported_programs_take_gates_in() -> None:
    exported = torch.export.export(smooth().eval(), (torch.ones(1, 3),))
    found = fxpath.analyze(exported, gates=True)
    assert [gate.called for gate in found.gates] == ["silu"]
    assert found.path_norm == fxpath.path_norm(smooth(), gates=True)
    with pytest.raises(fxpath.UnsupportedModelError, match="gates=True covers"):
        fxpath.analyze(exported)


def test_sizes_count_on_paths() -> None:
    """A gate of size c weighs as a linear map by c, of which path mass knows nothing else."""

    class Times(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2.5 * x

    model = plain()
    model[1] = nn.ELU(2.5)
    linear = plain()
    linear[1] = Times()
    assert math.isclose(fxpath.path_norm(model, gates=True), fxpath.path_norm(linear))
    magnitude = fxpath.path_magnitude(model, gates=True)
    shares = fxpath.criteria.path_shares(model, gates=True)
    for name, expected in fxpath.path_magnitude(linear).items():
        torch.testing.assert_close(magnitude[name], expected)
        torch.testing.assert_close(shares[name], fxpath.criteria.path_shares(linear)[name])


def test_a_pruned_network_says_generalised() -> None:
    pruned = fxpath.prune(smooth(), 0.5, gates=True)
    assert repr(pruned).endswith("of the generalised path-norm lost>")
    assert pruned.to_dict()["norm"] == GENERALISED
    assert fxpath.prune(plain(), 0.5, gates=True).to_dict()["norm"] == "path-norm"
    pytest.importorskip("matplotlib")
    zeros, losses = pruned.plot()
    assert "exactly" not in losses.get_xlabel() and GENERALISED in losses.get_xlabel()
    assert "at most" in zeros.get_title(loc="left") and GENERALISED in zeros.get_title(loc="left")


# -- certificates ----------------------------------------------------------------------------------


def test_there_is_no_certificate(program: fxpath.PathProgram, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no certificate of a generalised path-norm"):
        program.certificate()
    path = tmp_path / "net.pt2"
    with pytest.raises(ValueError, match=r"torch\.export\.save\(program\.exported\(\), path\)"):
        program.save(path)
    assert not path.exists()
    with pytest.raises(fxpath.UnsupportedModelError, match="Gates are not taken in here"):
        fxpath.certify(net(), SHAPE)


def test_the_remedy_that_a_refused_certificate_names_works(
    program: fxpath.PathProgram, tmp_path: Path
) -> None:
    torch.export.save(program.exported(), tmp_path / "net.pt2")
    found = torch.export.load(tmp_path / "net.pt2").module()()
    norm = float(found["mantissa"] * 2.0 ** found["exponent"])
    assert math.isclose(norm, program.path_norm(), rel_tol=1e-5)


# -- refusals --------------------------------------------------------------------------------------


def test_a_refusal_offers_gates() -> None:
    report = fxpath.check(smooth())
    assert "gates=True covers this network" in report.advice
    assert report.to_dict()["advice"] == report.advice
    said = str(report).replace("\n", " ")
    assert "path-metric, with every exact certificate" in said
    assert 'until="0"' in said, "the cut that passes is still named"
    with pytest.raises(fxpath.UnsupportedModelError, match="gates=True covers this network"):
        fxpath.path_norm(smooth())


def test_a_verb_without_gates_does_not_offer_them() -> None:
    with pytest.raises(fxpath.UnsupportedModelError) as caught:
        fxpath.path_metric(smooth(), scaled())
    advice = caught.value.report.advice
    assert "Gates are not taken in here; fxpath.analyze(..., gates=True) covers" in advice
    assert pickle.loads(pickle.dumps(caught.value)).report.advice == advice


def test_a_head_that_is_no_gate_is_cut_off_with_gates() -> None:
    model = nn.Sequential(smooth(), nn.LayerNorm(2))
    advice = fxpath.check(model, (3,)).advice
    assert advice.startswith('gates=True with until="0" covers this network up to there')
    assert fxpath.check(model, (3,), gates=True, until="0")


@pytest.mark.parametrize(
    "layers",
    [
        [plain(), nn.LayerNorm(2)],  # no gate at all
        [plain(), nn.LayerNorm(2), nn.SiLU()],  # gates take the cut no further
        [nn.SiLU(), nn.Linear(3, 3), nn.Softplus(), *[nn.Linear(3, 3)] * 29],  # nor far enough
    ],
)
def test_nothing_is_offered_that_does_not_help(layers: list[nn.Module]) -> None:
    report = fxpath.check(nn.Sequential(*layers), (3,))
    assert not report and report.advice == "" and "advice" not in report.to_dict()
    assert not fxpath.check(nn.Sequential(*layers), (3,), gates=True)


def test_nothing_is_captured_twice_for_the_offer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def counted(model: nn.Module, given: Given) -> Captured:
        calls.append(given)
        return capture(model, given)

    monkeypatch.setattr(fxpath.passes, "capture", counted)
    # Nothing stands before the activation, so that no cut is tried.
    report = fxpath.check(nn.Sequential(nn.SiLU(), nn.Linear(3, 2)), (3,))
    assert "gates=True covers" in report.advice and len(calls) == 1


def test_check_lists_gates() -> None:
    report = fxpath.check(net(), SHAPE, gates=True)
    assert report and repr(report) == "<SupportReport: supported, 3 gates>"
    assert f"supported, with a {GENERALISED}" in str(report)
    assert "conv2d_3 in 4" not in str(report) and "conv2d_3 in 3" in str(report)
    data = report.to_dict()
    assert data["norm"] == GENERALISED and len(report.gates) == 3
    assert json.loads(json.dumps(data))["gates"][0]["size"] == 1.5


# -- the command line ------------------------------------------------------------------------------

HERE = f"{Path(__file__)}:"


def test_gates_on_the_command_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    file = str(tmp_path / "found.json")
    names = [f"{HERE}smooth", f"{HERE}plain"]
    assert main(["analyze", *names, "--gates", "--json", file]) == 0
    out = capsys.readouterr().out
    assert f"l^1 {GENERALISED}" in out and "l^1 path-norm" in out
    norms = [fxpath.path_norm(make(), gates=True) for make in (smooth, plain)]
    assert f"{norms[0]:.6g} (generalised)" in out
    assert [each["norm"] for each in json.loads(Path(file).read_text())] == [
        GENERALISED,
        "path-norm",
    ]
    assert main(["check", names[0], "--gates"]) == 0
    assert "supported, with a generalised" in capsys.readouterr().out
    assert main(["check", names[0]]) == 2
    assert "--gates covers this network" in capsys.readouterr().out
    assert main(["graph", names[0], "--gates"]) == 0
    assert "# gates: silu" in capsys.readouterr().out


def test_pairs_and_files_on_the_command_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    one, other = f"{HERE}smooth", f"{HERE}scaled"
    assert main(["bound", one, other, "--gates"]) == 0
    out = capsys.readouterr().out
    bound = fxpath.lipschitz_bound(smooth(), scaled(), gates=True)
    assert f"at most {bound.value:g} in the l^1 norm" in out and "no path-metric" in out
    file = str(tmp_path / "pruned.safetensors")
    assert main(["prune", one, "--gates", "--amount", "0.4", "-o", file]) == 0
    assert "no exact certificate" in capsys.readouterr().out
    # A program in a file has a certificate, so that this command takes no gates in.
    assert main(["export", one, "-o", str(tmp_path / "net.pt2")]) == 2
    assert "fxpath analyze --gates covers" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, said",
    [
        ("bound a b --gates --max-relative 0.1", "--max-relative is about the path-metric"),
        ("prune a --gates --budget 0.1 -o b.safetensors", "--budget is about the path-metric"),
        ("prune a --gates --channels --amount 0.1 -o b.safetensors", "does not take gates in"),
        ("export a --gates -o b.pt2", "unrecognized arguments: --gates"),
    ],
)
def test_options_that_do_not_go_with_gates(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(line.split())
    assert said in capsys.readouterr().err


def test_functional_gates_are_in_the_model_itself() -> None:
    class Functional(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return functional.gelu(super().forward(x))

    (gate,) = fxpath.check(Functional(2, 2), (2,), gates=True).gates
    assert gate.module_path == "" and gate.source_line.endswith(
        "functional.gelu(super().forward(x))"
    )
    assert "(model)" in str(fxpath.check(Functional(2, 2), (2,), gates=True))
