"""The report: its values are those of the records, it is one safe file, and a browser shows it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import models
import pytest
from support import LITTLE, SHORT, apreqel, expect, made_up

from apreqel import pipeline
from apreqel.device.memory import memory_use
from apreqel.device.profile import DeviceProfile, dominated, type_speeds
from apreqel.device.store import load_named, store_folder
from apreqel.errors import OutputError, UsageError
from apreqel.evaluate.real_files import MeasuredFiles
from apreqel.evaluate.verify import KLD_PARTS, Trial, VerificationReport, VerifySettings
from apreqel.model.inventory import Inventory, read_inventory
from apreqel.model.qtypes import lookup
from apreqel.plan.plan import Plan
from apreqel.plan.request import PlanRequest
from apreqel.progress import silent
from apreqel.report import page
from apreqel.report.facts import Missing, ModelReport, PlanParts
from apreqel.report.gather import opened
from apreqel.sensitivity.measure import measure
from apreqel.sensitivity.texts import bundled_texts, heldout_text

pytest.importorskip("vl_convert", reason="the extra 'report' is not installed")

HOSTILE = "</script></title><script>window.hacked = 1</script><img src=x onerror=alert(1)>"
MODEL = "tiny model.gguf"


class Tables(HTMLParser):
    """Tables by caption: header and rows of texts; and every tag with its attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._caption, self._row, self._inside = "", [""], ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "caption":
            self._caption, self._inside = "", "caption"
        elif tag == "tr":
            self._row = []
            self.tables.setdefault(self._caption, []).append(self._row)
        elif tag in ("th", "td"):
            self._row.append("")
            self._inside = "cell"

    def handle_endtag(self, tag: str) -> None:
        if tag in ("caption", "th", "td"):
            self._inside = ""

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._inside == "caption":
            self._caption += data
        elif self._inside == "cell":
            self._row[-1] += data

    def rows(self, caption: str) -> list[dict[str, str]]:
        head, *rows = self.tables[caption]
        return [dict(zip(head, row, strict=True)) for row in rows]


def value(cell: str) -> float:
    """The number that a cell begins with."""
    return float(cell.split()[0].replace(",", "").rstrip("%"))


def near(expected: float) -> Any:
    """As it is rounded in the page."""
    return pytest.approx(expected, rel=6e-4, abs=1e-12)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model with everything measured, its name being hostile."""
    folder = tmp_path_factory.mktemp("report")
    # Rows of no multiple of 256 hold no IQ-types of three bits or less, whose tables take seconds.
    shape = {"n_embd": 192, "n_ff": 320, "n_layer": 2, "n_head": 3, "n_head_kv": 1}
    model = models.build(folder / MODEL, **shape, describe=lambda writer: writer.add_name(HOSTILE))
    # Timings of products are made up: they take long, and are tested elsewhere.
    seconds = {"F16": (9e-3, 9e-4), "Q8_0": (5e-3, 8e-4), "Q4_0": (3e-3, 5e-4),
               "Q5_0": (4e-3, 7e-4), "Q5_1": (5e-3, 9e-4), "IQ4_NL": (2e-3, 4e-4)}  # fmt: skip
    profile = made_up(read_inventory(model), seconds)
    profile.save(store_folder() / f"{profile.name}.json")
    trial = Trial(heldout_text(), ["Q5_K_S"], VerifySettings(128, 300, 16, 2))
    with (
        pipeline.open_workspace(
            str(model), folder=None, n_threads=2, allow_requantize=False, progress=silent
        ) as given,
        pipeline.equalised(given, True) as space,
    ):
        probed = measure(space, texts=bundled_texts(), settings=SHORT, effort=LITTLE)
        plan, path = pipeline.plan(probed, PlanRequest(target_bpw=6.0), profile, refine=False)
        file = folder / "tiny model-apreqel-accuracy.gguf"
        options = {"output": file, "force": False, "allow_requantize": False}
        pipeline.run_plan(path, **options, n_threads=2, progress=silent)
        pipeline.verify(space, file, trial, plan)
    return folder


@pytest.fixture(scope="module")
def work(measured: Path) -> Path:
    (plan,) = measured.rglob("plan.json")
    return plan.parent


@pytest.fixture(scope="module")
def facts(measured: Path) -> ModelReport:
    with opened(str(measured / MODEL), None, silent) as source:
        return source.report()


@pytest.fixture(scope="module")
def html(facts: ModelReport) -> str:
    return page.page(facts)


@pytest.fixture(scope="module")
def tables(html: str) -> Tables:
    return Tables(html)


@pytest.fixture(scope="module")
def made(work: Path) -> Plan:
    return Plan.load(work / "plan.json")


@pytest.fixture(scope="module")
def model(made: Plan) -> Inventory:
    return read_inventory(Path(made.model_files[0]))


@pytest.fixture(scope="module")
def profile(made: Plan) -> DeviceProfile:
    return load_named(made.device)


# --- values --------------------------------------------------------------------------------------


def test_tensors_are_those_of_the_plan(made: Plan, model: Inventory, tables: Tables) -> None:
    rows = {row["tensor"]: row for row in tables.rows("Tensors")}
    assert list(rows) == [t.name for t in model.quantizable]
    for tensor in model.quantizable:
        row, kind = rows[tensor.name], made.types[tensor.name]
        assert row["type"] == kind
        assert value(row["bytes"]) == lookup(kind).size_bytes(tensor.shape)
    shares = tables.rows("By role")
    assert {row["role"] for row in shares} == {t.role for t in model.quantizable}
    assert sum(value(r["bytes"]) for r in shares) == sum(value(r["bytes"]) for r in rows.values())
    damage = sum(value(row["damage, nats"]) for row in rows.values())
    assert sum(value(row["damage, nats"]) for row in shares) == near(damage)


def test_files_are_those_of_the_records(made: Plan, work: Path, tables: Tables) -> None:
    report = VerificationReport.load(work / "verification.json")
    rows = tables.rows(f"Verified on {report.text}")
    for row, file in zip(rows, report.files, strict=True):
        assert (row["file"], value(row["bytes"])) == (file.label, file.size_bytes)
        assert value(row["KLD, nats"]) == near(file.kld.mean)
        low, high = (float(part) for part in row["95%"].split(" to "))
        assert (low, high) == (near(file.kld.interval[0]), near(file.kld.interval[1]))
        assert int(row["n, tokens"]) == file.kld.count
    timed = tables.rows("Measured speeds")
    for row, file in zip(timed, report.files, strict=True):
        assert file.speed is not None
        assert value(row["decode t/s"]) == near(file.speed.decode)
        assert value(row["prefill t/s"]) == near(file.speed.prefill)
    (tail,) = (t for t in tables.tables if t.startswith("KL divergence in nats, n ="))
    for i, row in enumerate(tables.rows(tail)[: len(KLD_PARTS)]):
        assert value(row["apreqel"]) == near(report.files[1].kld_quantiles[i])
    assert all(f"{v.verdict[1:]}." in tables.text for v in report.versus) and report.versus
    known = MeasuredFiles.load(work / "measured-files.json").files.values()
    checked = tables.rows("Real files, measured on check text")
    assert sorted(value(row["bytes"]) for row in checked) == sorted(f.size_bytes for f in known)
    assert sorted(value(r["KLD, nats"]) for r in checked) == near(sorted(f.kld.mean for f in known))
    (plan,) = (r for r in tables.rows("Predicted files") if r["file"] == "the plan")
    assert value(plan["bytes"]) == made.size_bytes
    assert value(plan["KLD, nats"]) == near(made.damage_nats)


def test_the_device_is_as_its_profile_tells(
    made: Plan, model: Inventory, profile: DeviceProfile, tables: Tables, facts: ModelReport
) -> None:
    speeds = type_speeds(profile, model)
    rows = {row["type"]: row for row in tables.rows("By type")}
    assert rows.keys() == speeds.keys()
    nats = {name: value(r["KLD, nats (95%)"]) for name, r in rows.items() if len(r) and
            r["KLD, nats (95%)"] != "-"}  # fmt: skip
    beaten = dominated(speeds, nats)
    for name, row in rows.items():
        speed, _ = speeds[name]
        assert value(row["decode t/s (95%)"]) == near(speed.decode.value)
        assert row["dominated by"] == beaten.get(name, "")
    # The closest quantised type is no worse than others for being large.
    assert rows["Q8_0"]["dominated by"] == ""
    for row in tables.rows("Bytes by context"):
        n_ctx = int(value(row["context"]))
        use = memory_use(profile, model, made.types, made.size_bytes, n_ctx, made.cache_types)
        assert value(row["in all"]) == use.total_bytes
    assert value(tables.rows("Bytes by context")[-1]["context"]) == model.context_length
    planned = [r for r in tables.rows("Predicted speeds") if r["file"] == "the plan"]
    assert made.speed and value(planned[0]["decode t/s (95%)"]) == near(made.speed.decode.value)
    assert {r["name"] for r in tables.rows("Predicted speeds") if r["file"] == "stock preset"}


# --- one file, the same each time, that does nothing ---------------------------------------------


def test_the_same_measurements_give_the_same_bytes(
    measured: Path, html: str, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(measured, moved)
    done = apreqel("report", moved / MODEL, "-o", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").read_text() == html
    assert str(measured) not in html and str(tmp_path) not in html
    assert "against stock" in done.stdout and str(tmp_path / "page.html") in done.stdout


def test_nothing_is_fetched_and_names_do_nothing(facts: ModelReport, html: str) -> None:
    parts = facts.parts
    assert isinstance(parts, PlanParts)
    odd = replace(parts.tensors[0], name=HOSTILE, role=f"'\"{HOSTILE}")
    share = replace(parts.shares[0], role=HOSTILE, types=[HOSTILE])
    parts = replace(parts, tensors=[odd, *parts.tensors[1:]], shares=[share, *parts.shares[1:]])
    missing = Missing(HOSTILE, f"apreqel probe '{HOSTILE}'")
    for text in (html, page.page(replace(facts, parts=parts, kernels=missing))):
        found = Tables(text)
        assert [tag for tag, _ in found.tags].count("script") == 1
        assert not any(tag in ("img", "link", "iframe", "object", "use") for tag, _ in found.tags)
        for _, attributes in found.tags:
            assert not {"src", "href", "xlink:href", "onerror", "onload"} & attributes.keys()
        assert HOSTILE[:17] not in text and HOSTILE in found.text
        for word in ("url(", "@import", "fetch("):
            assert word not in text, word
        assert "default-src 'none'" in text
    assert len(html.encode()) < 2_000_000


def test_every_plot_can_be_read(html: str) -> None:
    found = Tables(html)
    figures = [attributes for tag, attributes in found.tags if tag == "figure"]
    assert len(figures) == 9 and all(figure["aria-label"] for figure in figures)
    captions = [attributes for tag, attributes in found.tags if tag == "figcaption"]
    details = [attributes for tag, attributes in found.tags if tag == "details"]
    assert len(captions) == len(figures) and len(details) == len(found.tables) >= 10


# --- what is not there ---------------------------------------------------------------------------


def test_what_is_missing_is_said_with_its_command(
    measured: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "part"
    shutil.copytree(measured, moved)
    folder = moved / work.relative_to(measured)

    def shown() -> str:
        with opened(str(moved / MODEL), None, silent) as source:
            return Tables(page.page(source.report())).text

    old = json.loads((folder / "verification.json").read_text())
    old["schema_version"] = 2
    (folder / "verification.json").write_text(json.dumps(old))
    verify = "apreqel verify FILE.gguf --plan plan.json --against Q4_K_M --model"
    assert f"The verification is an older apreqel's. {verify} '{MODEL}'" in shown()
    (ratios,) = folder.glob("moments-*/ratios.json")
    ratios.unlink()
    text = shown()
    assert "predictions are for weights as ggml rounds." in text
    assert "What the plan was chosen from was measured anew since, or is gone" in text
    (folder / "plan.json").unlink()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "nothing"))
    text = shown()
    assert "Predicted files" in text and "Tensors" not in text
    assert f"apreqel plan '{MODEL}'" in text and f"apreqel profile '{MODEL}'" in text
    (folder / "sensitivity.json").unlink()
    assert f"The model was not probed. apreqel probe '{MODEL}'" in shown()
    done = apreqel("report", moved / MODEL, "-o", tmp_path / "page.html", "--json", "-q")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parts"]["command"] == f"apreqel probe '{MODEL}'"


def test_what_is_refused(measured: Path, work: Path, tmp_path: Path) -> None:
    model, foreign, target = measured / MODEL, tmp_path / "mine.html", tmp_path / "page.html"
    foreign.write_text("<!DOCTYPE html>\n<p>mine</p>")

    def refuse(path: Path, why: str, force: bool) -> None:
        before = path.read_bytes() if path.is_file() else b""
        with pytest.raises(OutputError, match=why):
            page.written(str(model), None, path, force, silent)
        assert before == (path.read_bytes() if path.is_file() else b"")

    refuse(foreign, "exists and is no report; use --force", False)
    refuse(model, "is what the report is made from", True)
    refuse(work / "sensitivity.json", "is what the report is made from", True)
    refuse(tmp_path, "is no ordinary file", True)
    # With --force in the place of another file; a page of its own is replaced without. By a plan.
    page.written(str(model), None, foreign, True, silent)
    first = foreign.read_bytes()
    page.written(str(work / "plan.json"), None, foreign, False, silent)
    assert foreign.read_bytes() == first
    alone = Path(shutil.copy(model, tmp_path / "alone.gguf"))
    expect(10, "no such work folder, nothing was measured yet", "report", alone, "-o", target)
    (written,) = measured.glob("*-apreqel-*.gguf")
    expect(2, "is a file that apreqel wrote; give the model", "report", written, "-o", target)
    assert not (tmp_path / "alone.gguf.apreqel").exists() and not target.exists()


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"pip install 'apreqel\[report\]'"):
        page.require_extra()


# --- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real Chromium that logs what pages ask for."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.webdriver.chrome.service import Service

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no chromium with its driver is installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options=options, service=Service(driver)) as running:
        yield running


@pytest.mark.parametrize("width", [360, 1200])
def test_in_a_browser(browser: Any, html: str, tmp_path: Path, width: int) -> None:
    (tmp_path / "page.html").write_text(html)
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get((tmp_path / "page.html").as_uri())
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [
        m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"
    ]
    assert urls == [(tmp_path / "page.html").as_uri()]
    assert browser.get_log("browser") == []
    run = browser.execute_script
    assert run("return [window.hacked, document.scripts.length]") == [None, 1]
    assert run("return document.documentElement.scrollWidth") <= width
    assert HOSTILE in run("return document.querySelector('h1').textContent")
    # One of the two drawings of each plot is seen.
    drawings = "[...document.querySelectorAll('figure svg')]"
    assert run(f"return {drawings}.filter(s => s.getBoundingClientRect().width).length") == 9
    # With the keyboard, what a tensor says is shown: of the first, then of the next.
    texts = run(
        """
        const figure = [...document.querySelectorAll("figure")].find(
            f => f.getAttribute("aria-label") === "Types by layer and role");
        const plot = [...figure.querySelectorAll("svg")].find(s => s.getBoundingClientRect().width);
        const tip = document.getElementById("tip"), told = [];
        plot.querySelector("[tabindex]").focus();
        told.push(tip.textContent);
        const key = new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true});
        document.activeElement.dispatchEvent(key);
        told.push(tip.textContent, tip.hidden);
        return told;
        """
    )
    assert all(" bits), " in text and " bytes, damage " in text for text in texts[:2]), texts
    assert texts[0] != texts[1] and texts[2] is False
    # In the dark, too, letters stand out from their ground.
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        style = "getComputedStyle(document.body)"
        letters, ground = run(f"return [{style}.color, {style}.backgroundColor]")
        assert contrast(letters, ground) > 7


def contrast(one: str, other: str) -> float:
    """Of two colours 'rgb(r, g, b)', by WCAG 2.1."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in colour.strip("rgba()").split(",")[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    a, b = sorted((luminance(one), luminance(other)))
    return (b + 0.05) / (a + 0.05)
