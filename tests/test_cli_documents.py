"""`fxpath analyze`: files and standard output hold what the library gives."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import fxpath
from fxpath import analyzing
from fxpath_command import main
from tests.support.command_line import fails, seeded_mlp


def analysis(nets: Path) -> fxpath.Analysis:
    return fxpath.analyze(seeded_mlp(nets), (4,))


def test_files_of_one_model_are_those_of_the_library(
    nets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--csv", "a.csv", "--markdown", "a.md", "--json", "a.json"]
    assert main(["analyze", "some_nets:mlp", *files]) == 0
    out, err = capsys.readouterr()
    found = analysis(nets)
    assert str(found) in out and err == ""
    assert Path("a.csv").read_text() == found.to_csv()
    assert Path("a.md").read_text() == found.to_markdown()
    (data,) = json.loads(Path("a.json").read_text())
    assert data == {"name": "some_nets:mlp", **json.loads(found.to_json())}


@pytest.mark.parametrize("form", ["csv", "markdown"])
def test_standard_output_is_the_document(
    nets: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    assert main(["analyze", "some_nets:mlp", f"--{form}", "-", "--top", "1"]) == 0
    assert capsys.readouterr() == (getattr(analysis(nets), f"to_{form}")(), "")


def test_several_models_share_a_table(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = ["some_nets:mlp", "some_nets:with_head", "some_nets:instance"]
    assert main(["analyze", *models, "--csv", "-", "--markdown", "a.md"]) == 2
    out, err = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(out)))
    names = ["some_nets:mlp"] * 2 + ["some_nets:instance"] * 2
    assert [row.pop("model") for row in rows] == names
    assert rows[:2] == list(csv.DictReader(io.StringIO(analysis(nets).to_csv())))
    lines = Path("a.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["model", "-" * 20, *names]
    assert err.count("no exact rule") == 1


def test_no_result_is_no_table(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["analyze", "some_nets:with_head", "--csv", "a.csv", "--json", "a.json"]
    assert main(argv) == 2
    assert not Path("a.csv").exists() and json.loads(Path("a.json").read_text()) == []


def test_a_report(
    nets: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analyzing, "page", lambda report: json.dumps(report))
    assert main(["analyze", "some_nets:mlp", "--html", "a.html"]) == 0
    assert str(analysis(nets)) in capsys.readouterr().out
    report = json.loads(json.dumps(analysis(nets).report()))
    report["title"] = f"some_nets:mlp: {report['title']} (its own weights)"
    assert json.loads(Path("a.html").read_text()) == report
    assert main(["analyze", "some_nets:mlp", "--html", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == report
    two = ["analyze", "some_nets:mlp", "some_nets:mlp"]
    assert "--html goes with one MODEL" in fails(capsys, *two, "--html", "a.html")


def test_two_documents_need_two_files(capsys: pytest.CaptureFixture[str], nets: Path) -> None:
    for file in ("-", "a.csv"):
        argv = ["analyze", "some_nets:mlp", "--csv", file, "--json", file]
        assert f"--csv and --json both go to {file}" in fails(capsys, *argv)
    assert "name all MODELs together" in fails(capsys, "analyze", "a", "--json", "b.json", "c")


def test_one_file_has_many_names(capsys: pytest.CaptureFixture[str], nets: Path) -> None:
    Path("a.csv").write_text("before")
    Path("soft.csv").symlink_to("a.csv")
    os.link("a.csv", "hard.csv")
    for other in ("./a.csv", str(Path("a.csv").absolute()), "soft.csv", "hard.csv"):
        argv = ["analyze", "some_nets:mlp", "--csv", "a.csv", "--json", other]
        assert "--csv and --json both go to a.csv, which is" in fails(capsys, *argv)
    argv = ["analyze", "some_nets:mlp", "--markdown", "new.md", "--html", "./new.md"]
    assert "--markdown and --html both go to new.md" in fails(capsys, *argv)
    assert Path("a.csv").read_text() == "before" and not Path("new.md").exists()
    assert main(["analyze", "some_nets:mlp", "--csv", "a.csv", "--json", "b.json"]) == 0
    capsys.readouterr()
    argv = ["prune", "some_nets:mlp", "--channels", "--amount", "1", "-o", "w", "--plan", "./w"]
    assert "--output and --plan both go to w" in fails(capsys, *argv)


# Which rows


DEEP = """
from torch import nn

def deep():
    return nn.Sequential(
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)),
        nn.ReLU(),
        nn.Sequential(nn.Linear(2, 9), nn.ReLU(), nn.Linear(9, 1)),
    )
"""


def printed(out: str) -> list[list[str]]:
    """The cells of the rows below the line of dashes."""
    lines = out.split("\n\n")[1].splitlines()
    assert max(map(len, lines)) <= 100
    return [line.split() for line in lines[2:]]


def test_sums_by_module(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (nets / "deep.py").write_text(DEEP)
    argv = ["analyze", "deep.py:deep", "--depth", "1"]
    assert main(argv) == 0
    first, second = printed(capsys.readouterr().out)
    assert first[:4] == ["0", "2", "layers", str(4 * 6 + 6 + 6 * 2 + 2)]
    assert second[:4] == ["2", "2", "layers", str(2 * 9 + 9 + 9 + 1)]
    assert main([*argv, "--csv", "-"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["layer"], row["parameters"]) for row in rows] == [("0", "44"), ("2", "37")]
    assert "a number from 1 on" in fails(capsys, *argv[:2], "--depth", "0")


def test_the_rows_that_carry_least(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (nets / "deep.py").write_text(DEEP)
    assert main(["analyze", "deep.py:deep", "--top", "3"]) == 0
    out = capsys.readouterr().out
    rows = printed(out)
    assert "per parameter" in out and "shape" not in out.split("\n\n")[1]
    data = fxpath.analyze(load(nets)).layers
    carried = {row["name"]: row["share"] / row["parameters"] for row in data}
    assert [row[0] for row in rows] == sorted(carried, key=carried.__getitem__)[:3]
    assert len(carried) == 4
    assert "a number from 1 on" in fails(capsys, "analyze", "deep.py:deep", "--top", "x")


def load(nets: Path) -> object:
    return fxpath.capture.loading.load_model(f"{nets / 'deep.py'}:deep")


def test_why_a_bound_is_large_is_said_beside_it(
    nets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(1)
    torch.save(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).state_dict(), "b.pt")
    assert main(["bound", "some_nets:mlp", "b.pt", "--radius", "3"]) == 0
    out = capsys.readouterr().out
    bound = fxpath.lipschitz_bound(seeded_mlp(nets), torch.load("b.pt"), radius=3.0)
    said = f"at most {bound.value:g} in the l^1 norm, for inputs with entries in [-3, 3]"
    assert said in out and "Why so large?" in out
    assert main(["bound", "some_nets:mlp", "some_nets:mlp"]) == 0
    assert "at most 0 in" in (out := capsys.readouterr().out) and "Why so" not in out
