"""`fxpath compare`: what it prints and writes, its exit code, and a bar at a terminal."""

from __future__ import annotations

import contextlib
import copy
import io
from pathlib import Path

import pytest
import torch

import fxpath
from fxpath_command import main, terminal
from fxpath_command.parser import parse
from tests.support.command_line import fails, seeded_mlp


@pytest.fixture
def files(nets: Path) -> list[str]:
    model = seeded_mlp(nets)
    for i in range(3):
        torch.save(model.state_dict(), f"{i}.pt")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
    return ["0.pt", "1.pt", "2.pt"]


def test_it_prints_what_the_verb_finds(
    nets: Path, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    argv = ["compare", "some_nets:mlp", *files, "--reference", "1.pt", "--radius", "2"]
    assert main([*argv, "--csv", "out.csv", "--plot", "out.png"]) == 0
    out, err = capsys.readouterr()
    found = fxpath.compare(seeded_mlp(nets), files, reference="1.pt", radius=2.0)
    assert out == f"{found}\n" and err == ""
    assert Path("out.csv").read_text() == found.to_csv()
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")
    assert main([*argv, "--quiet"]) == 0 and capsys.readouterr() == ("", "")


def test_files_that_are_refused_are_named_at_the_end(
    nets: Path, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("1.pt").write_text("no weights")
    assert main(["compare", "some_nets:mlp", *files, "3.pt"]) == 2
    out, err = capsys.readouterr()
    assert "2 checkpoints, compared with 0.pt" in out
    first, second = err.splitlines()
    assert first.startswith("fxpath: error: 1.pt: cannot be read") and "3.pt: no such" in second


def test_what_cannot_be_compared(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["compare", "some_nets:mlp", *files]
    assert "no exact rule" in failing(capsys, "compare", "some_nets:with_head", *files)
    assert "the reference is refused: 9.pt: no such" in fails(capsys, *argv, "--reference", "9.pt")
    assert "name files" in fails(capsys, *argv, "--checkpoint", "0.pt")
    assert "both go to out" in fails(capsys, *argv, "--csv", "out", "--plot", "out")
    Path("out.csv").write_text("a,b\n")
    assert "out.csv: holds another table" in fails(capsys, *argv, "--csv", "out.csv")
    pytest.importorskip("matplotlib")
    assert main([*argv, "--plot", "out.odd"]) == 2
    assert "--plot out.odd" in capsys.readouterr().err


def failing(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    return capsys.readouterr().err


def test_help_says_how_to_go_on_and_how_to_share(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["compare", "--help"])
    out = capsys.readouterr().out
    assert "goes on where it stopped" in out and "torchrun --nproc-per-node=4" in out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_for_a_terminal(
    nets: Path, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for screen in (Terminal(), io.StringIO()):
        with contextlib.redirect_stderr(screen), contextlib.redirect_stdout(io.StringIO()):
            assert main(["compare", "some_nets:mlp", *files]) == 0
        seen = screen.getvalue()
        assert bool(seen) == screen.isatty()
        assert all(f"{i} of 3" in seen for i in (1, 2, 3)) == screen.isatty()
        assert seen.endswith("\r\x1b[K" * screen.isatty())
    with contextlib.redirect_stderr(Terminal()), terminal.counting(quiet=True) as tell:
        assert tell is None


def test_the_bar_estimates_from_this_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    times = iter((0.0, 2.0, 4.0))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(times))
    screen = Terminal()
    with contextlib.redirect_stderr(screen), terminal.counting() as tell:
        assert tell is not None
        tell(5, 8, "five.pt")  # four were there before
        tell(6, 8, "six.pt")
    first, second = copy.copy(screen.getvalue()).split("\r\x1b[K")[1:3]
    assert "5 of 8, 6 s left: five.pt" in first and "6 of 8, 4 s left: six.pt" in second
