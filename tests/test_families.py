"""Models of many families go the whole way: probed, planned, quantised, run by llama.cpp."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from families import FAMILIES, N_LAYERS, build_family
from support import divergences_of_files, measure, planner_of, uniform

from apreqel.model.inventory import read_inventory
from apreqel.plan.make_plan import make_plan
from apreqel.plan.request import PlanRequest
from apreqel.plan.solve import solve_request
from apreqel.quantize import quantize_model
from apreqel.sensitivity.texts import check_set


@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_way(name: str, tmp_path: Path) -> None:
    model = build_family(tmp_path / f"{name}.gguf", name)
    inventory = read_inventory(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probed = measure(inventory, tmp_path / "w")
    assert probed.sensitivity.self_kld_nats < 1e-4
    # Every head and every expert was reached, whatever its weights lie beside.
    for tensor, entry in probed.imatrix.entries.items():
        assert (entry.counts > 0).all(), tensor
    idle = {t.name: "Q8_0" for t in inventory.quantizable if (t.layer or 0) >= N_LAYERS}
    usual = uniform(inventory, "Q5_0") | idle
    request = PlanRequest(max_size_bytes=inventory.output_size(usual))
    planner = planner_of(probed, request=request)
    made = make_plan(planner, solve_request(planner))
    found = {}
    for label, types in (("planned", made.types), ("usual", usual)):
        path = tmp_path / f"{label}.gguf"
        quantize_model(inventory, types, path, imatrix=probed.imatrix)
        klds = divergences_of_files(model, path, check_set(probed.sensitivity.check_tokens))
        assert np.isfinite(klds).all()
        found[label] = klds.mean()
    print(found)
    assert 0 < found["planned"] < found["usual"]
    assert {name: made.types[name] for name in idle} == idle
