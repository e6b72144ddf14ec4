"""A list of checkpoints shared out between two processes by gloo; one of them is killed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn

import fxpath
from fxpath_command import main
from tests.support.pages import ROOT

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo"
)

MODEL = "from torch import nn\ndef make(): return nn.Linear(3, 2)\n"

#: The command line, in a process that is killed when it is about to read one of the files, or that
#: sleeps longer than the others wait.
KILLED = """
import datetime, os, signal, sys, time
from fxpath import comparing
from fxpath.checkpoints import series
from fxpath_command import main
read = series.read
def fatal(common, file, *rest):
    if file == os.environ.get("FATAL"):
        os.kill(os.getpid(), signal.SIGKILL)
    if file == os.environ.get("SLOW"):
        time.sleep(12)
    return read(common, file, *rest)
series.read = fatal
if "SLOW" in os.environ:
    comparing._PATIENCE = datetime.timedelta(seconds=4)
sys.exit(main())
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Seven checkpoints, of which the fourth is none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(MODEL)
    torch.manual_seed(0)
    found = [f"{i}.pt" for i in range(7)]
    for file in found:
        torch.save(nn.Linear(3, 2).state_dict(), file)
    Path(found[3]).write_text("no weights")
    return found


def ranks(
    files: Sequence[str], fatal: Sequence[str] = ("", ""), **more: str
) -> list[subprocess.CompletedProcess[str]]:
    """`fxpath compare` as two ranks; each is killed before it reads its fatal file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, "compare", "net.py:make", *files, "--csv", "out.csv"]
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, **more, "RANK": str(rank), "FATAL": file},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, file in enumerate(fatal)
    ]
    try:
        told = [each.communicate(timeout=300) for each in started]
    finally:
        for each in started:
            each.kill()
    return [
        subprocess.CompletedProcess(command, each.returncode, *texts)
        for each, texts in zip(started, told, strict=True)
    ]


def test_two_ranks_say_what_one_process_says(files: list[str]) -> None:
    first, second = ranks(files)
    alone = fxpath.compare(nn.Linear(3, 2), files)
    assert len(alone.rows) == 6 and Path("out.csv").read_text() == alone.to_csv()
    assert (first.returncode, second.returncode) == (2, 0)
    assert "6 checkpoints" in first.stdout and first.stderr.count("3.pt: cannot be read") == 1
    assert second.stdout == second.stderr == ""


@pytest.mark.parametrize("lost", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_rank_that_is_killed_is_named_and_rows_stay(files: list[str], lost: int) -> None:
    # Rank 0 has files 0 to 3, rank 1 the others, and the one before them.
    both = ranks(files, ("2.pt", "") if lost == 0 else ("", "6.pt"))
    other = both[1 - lost]
    assert both[lost].returncode == -9 and other.returncode == 2
    assert f"rank {lost} ended" in other.stderr and "Traceback" not in other.stderr
    kept = [line.partition(",")[0] for line in Path("out.csv").read_text().splitlines()]
    assert kept == ["file", "0.pt", "4.pt", "1.pt", "5.pt", *["2.pt"] * lost]
    found = fxpath.compare(nn.Linear(3, 2), files, csv="out.csv")
    assert found.rows == fxpath.compare(nn.Linear(3, 2), files).rows


@pytest.mark.long
def test_a_rank_that_does_not_answer_is_named(files: list[str]) -> None:
    first, _ = ranks(files, SLOW="6.pt")
    assert first.returncode == 2 and "rank 1 ended, or has not answered in time" in first.stderr


def test_variables_of_half_a_launch_are_none(
    files: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["compare", "net.py:make", *files[:2]]) == 0
    assert "2 checkpoints" in capsys.readouterr().out
