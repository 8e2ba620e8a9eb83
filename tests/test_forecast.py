"""What is said before the first slow step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support import apreqel

from apreqel.console import forecast as view
from apreqel.forecast import Forecast, TokenSeconds, forecast_for, token_seconds
from apreqel.llama.engine import LoadedModel
from apreqel.model.inventory import read_inventory
from apreqel.sensitivity.effort import EFFORTS
from apreqel.sensitivity.imatrix_collection import n_matrices
from apreqel.workspace import Workspace


def space_of(model: Path, folder: Path) -> Workspace:
    return Workspace(read_inventory(model), "", folder, 1)


def test_a_token_takes_what_llama_cpp_takes(llama_model: Path, tmp_path: Path) -> None:
    found = token_seconds(space_of(llama_model, tmp_path))
    with LoadedModel(llama_model) as model, model.context(256, 1, 1) as context:
        context.seconds(8, 1)
        prompt, answer = context.seconds(128, 8)
    # The order of magnitude: machines drift.
    assert prompt / 128 / 20 < found.prefill < prompt / 128 * 20
    assert answer / 8 / 20 < found.decode < answer / 8 * 20


def test_more_work_takes_longer(llama_model: Path, tmp_path: Path) -> None:
    space, token = space_of(llama_model, tmp_path), TokenSeconds(0.002, 0.01)

    def told(effort: str = "normal", token: TokenSeconds = token, **asked: bool) -> Forecast:
        asked = {"plain": False, "whole": True} | asked
        return forecast_for(space, EFFORTS[effort], token, **asked)

    usual = told()
    assert usual.total_seconds == pytest.approx(sum(usual.seconds.values()))
    slower = told(token=TokenSeconds(0.004, 0.02))
    assert slower.seconds["imatrix"] == pytest.approx(2 * usual.seconds["imatrix"])
    # 64 chunks of 512 tokens, and what listening to them takes.
    assert 64 * 512 * 0.002 < usual.seconds["imatrix"] < 2 * 64 * 512 * 0.002
    by_effort = [told(effort).total_seconds for effort in ("quick", "normal", "thorough")]
    assert by_effort == sorted(by_effort)
    assert told(plain=True).total_seconds < usual.total_seconds
    assert told(plain=True).disk_bytes < usual.disk_bytes
    probing = told(whole=False)
    assert set(probing.seconds) < set(usual.seconds) and "verification" in usual.seconds
    short = forecast_for(
        space, replace(EFFORTS["normal"], minutes=0.01), token, plain=False, whole=True
    )
    assert short.seconds["probes"] <= 0.6
    weights = sum(space.inventory.by_name[n].n_elements for n in n_matrices(space.inventory))
    assert usual.memory_bytes >= 2 * weights


def test_only_what_is_long_is_said(
    llama_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    view.show(Forecast({"imatrix": 30.0}, 10, 10), None)
    assert capsys.readouterr().err == ""
    long = Forecast({"imatrix": 60.0, "probes": 600.0}, 1_500_000_000, 300_000_000)
    view.show(long, Forecast({"imatrix": 60.0}, 10, 10))
    assert capsys.readouterr().err == (
        "apreqel: this will take about 11 min 00 s here (imatrix 60 s, probes 10 min 00 s); with "
        "--effort quick about 60 s; 1.50 GB of disk, 300.0 MB of memory; Ctrl-C keeps what is "
        "done\n"
    )
    done = apreqel("probe", llama_model, "--workdir", tmp_path, "--minutes", "0.1", "-t", "1", "-q")
    assert done.returncode == 0 and "this will take" not in done.stderr
