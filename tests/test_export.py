"""A folder to publish: its names, card, Modelfile and records, from friendly and hostile models."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import models
import pytest
import yaml
from gguf import GGUFWriter
from support import Finished, apreqel, expect, finished

from apreqel.artifacts import plain
from apreqel.errors import ArtifactError, OutputError, UsageError
from apreqel.llama.flags import RunSettings
from apreqel.model.gguf_header import STRING, encode_kv
from apreqel.model.inventory import read_inventory
from apreqel.plan.constraints import Constraints
from apreqel.plan.plan import Plan
from apreqel.plan.request import PlanRequest
from apreqel.publish.card import escaped
from apreqel.publish.folder import Exported, Publishing, export
from apreqel.publish.front_matter import as_yaml, front_matter
from apreqel.publish.modelfile import modelfile
from apreqel.publish.naming import cleaned, distinct, encoding_of, model_stem
from apreqel.publish.records import planned_file, without_paths
from apreqel.publish.request_command import command_of

# docs/gguf.md, "Validating Above Naming Convention", with Python's names of groups.
CONVENTION = re.compile(
    r"^(?P<BaseName>[A-Za-z0-9\s]*(?:(?:-(?:(?:[A-Za-z\s][A-Za-z0-9\s]*)|(?:[0-9\s]*)))*))-"
    r"(?:(?P<SizeLabel>(?:\d+x)?(?:\d+\.)?\d+[A-Za-z](?:-[A-Za-z]+(\d+\.)?\d+[A-Za-z]+)?)"
    r"(?:-(?P<FineTune>[A-Za-z0-9\s-]+))?)?-(?:(?P<Version>v\d+(?:\.\d+)*))"
    r"(?:-(?P<Encoding>(?!LoRA|vocab)[\w_]+))?(?:-(?P<Type>LoRA|vocab))?"
    r"(?:-(?P<Shard>\d{5}-of-\d{5}))?\.gguf$"
)
TEMPLATE = "{{ messages[0]['content'] + '<|endoftext|>' }}"
HOSTILE = 'ev|il\n---\n../../x <b>"a"</b> `$(id)`\r\nFROM /etc/passwd\x1b[31m {{ .System }} [l](u)'


def described(writer: GGUFWriter) -> None:
    writer.add_name("Tiny Llama")
    writer.add_basename("Tiny-Llama")
    writer.add_finetune("Chat")
    writer.add_size_label("1.3M")
    writer.add_license("apache-2.0")
    writer.add_languages(["en", "de", "not a language"])
    writer.add_tags(["text-generation", "small"])
    writer.add_source_repo_url("https://huggingface.co/some-org/Tiny-Llama-Chat")
    writer.add_chat_template(TEMPLATE)


def hostile(writer: GGUFWriter) -> None:
    writer.add_name(HOSTILE)
    writer.add_finetune("../" + HOSTILE)
    writer.add_version("--force")
    writer.add_size_label("/")
    writer.add_license("any\n---\nkey: value")
    writer.add_tags([HOSTILE, "a: b", "- c", "\u2028d"])
    writer.add_base_model_count(1)
    writer.add_base_model_repo_url(0, "https://huggingface.co/../../x\nb: c")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    model = models.build(folder / "tiny.gguf", describe=described)
    return finished(model, PlanRequest(target_bpw=6.0, plain=True, any_speed=True))


@pytest.fixture(scope="module")
def exported(done: Finished, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(planned_file(done.file), Publishing(tmp_path_factory.mktemp("out") / "folder"))


def front_of(card: str) -> dict[str, object]:
    start, front, _ = re.split(r"^---$", card, maxsplit=2, flags=re.MULTILINE)
    assert start == ""
    found = yaml.safe_load(front)
    assert isinstance(found, dict)
    return found


def test_the_card_says_what_the_records_say(done: Finished, exported: Exported) -> None:
    card = (exported.folder / "README.md").read_text()
    assert front_of(card) == {
        "base_model": "some-org/Tiny-Llama-Chat",
        "base_model_relation": "quantized",
        "language": ["en", "de"],
        "library_name": "gguf",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "apreqel", "text-generation", "small"],
    }
    name = next(name for name in exported.files if name.endswith(".gguf") and "Tiny" in name)
    rows = [line.split(" | ") for line in card.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if len(row) == 9][2:]
    assert len(rows) == len(done.report.files) == 3
    kept = json.loads((exported.folder / "verification.json").read_text())["data"]["files"]
    for row, record, measured in zip(rows, kept, done.report.files, strict=True):
        assert int(row[1].replace(",", "")) == record["size_bytes"] == measured.size_bytes
        figures = [float(figure) for figure in re.findall(r"[\d.]+", row[3])]
        if measured.label != "original":
            error = 1.959964 * record["kld"]["standard_error"]
            mean = record["kld"]["mean"]
            assert figures == pytest.approx([mean, mean - error, mean + error], abs=5.1e-6)
            assert f"{100 * record['top1']['mean']:.1f}%" in row[6]
        assert float(row[8].split(" ")[0]) == pytest.approx(measured.speed.decode, abs=0.051)  # type: ignore[union-attr]
    assert f"`{name}`" in rows[1][0] and kept[1]["path"] == name
    assert (exported.folder / name).stat().st_size == done.report.files[1].size_bytes
    if find_spec("vl_convert"):
        report = (exported.folder / "report.html").read_text()
        assert 'data-made-by="apreqel report"' in report and "`report.html`" in card


def test_the_name_is_that_of_the_convention(done: Finished, exported: Exported) -> None:
    (name,) = exported.how
    found = CONVENTION.match(name)
    assert found is not None
    assert found["BaseName"] == "Tiny-Llama" and found["SizeLabel"] == "1.3M"
    assert found["FineTune"] == "Chat" and found["Version"] == "v1.0"
    # The rival that was built for the verification tells what a preset takes here.
    stock = {"Q4_K_M": done.report.files[2].size_bytes}
    own = done.file.stat().st_size
    assert found["Encoding"] in ("Q5_K_M", "Q5_K_S", "Q6_K") and own > stock["Q4_K_M"]
    rival = next((done.model.parent / "tiny.gguf.apreqel").glob("stock-Q4_K_M*.gguf"))
    assert encoding_of(read_inventory(rival)) == "Q4_K_M"


def test_uniform_files_and_ladders_have_names_that_are_known(tmp_path: Path) -> None:
    assert encoding_of(read_inventory(models.build(tmp_path / "a.gguf", kind="Q8_0"))) == "Q8_0"
    assert encoding_of(read_inventory(models.build(tmp_path / "b.gguf", kind="Q4_0"))) == "Q4_0"
    assert distinct(["Q4_K_M", "Q6_K", "Q4_K_M"]) == ["Q4_K_M", "Q6_K", "Q4_K_M_B"]
    # 288 x 256 embeddings and heads, two layers of attention, one expert of 3 x 256 x 256 in each.
    mixture = read_inventory(models.build_moe(tmp_path / "moe.gguf"))
    assert model_stem(mixture) == "tiny-4x937K-v1.0"
    assert model_stem(mixture, "Some Name 2M Instruct v0.2") == "Some-Name-2M-Instruct-v0.2"


def test_twice_the_same_and_nothing_of_this_machine(
    done: Finished, exported: Exported, tmp_path: Path
) -> None:
    again = export(planned_file(done.file), Publishing(tmp_path / "again"))
    assert again.files == exported.files
    for name in again.files:
        content = (again.folder / name).read_bytes()
        assert content == (exported.folder / name).read_bytes()
        for secret in (str(done.model.parent), str(Path.home()), str(tmp_path), os.getcwd()):
            assert secret.encode() not in content, name
    for line in (again.folder / "apreqel.sha256").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((again.folder / name).read_bytes()).hexdigest() == digest
    # The plan and its lists are still those of the file.
    copied = planned_file(again.folder / next(iter(again.how)))
    assert copied.plan_path.parent == again.folder
    assert copied.plan.types == Plan.load(done.plan).types
    assert copied.report is not None and copied.report.versus == done.report.versus
    assert Plan.load(done.plan).model_files == [str(done.model)]  # the original is as it was


def test_what_is_not_ours_stays(done: Finished, tmp_path: Path) -> None:
    found, folder = planned_file(done.file), tmp_path / "mine"
    folder.mkdir()
    card = folder / "README.md"
    card.write_text("my own words")
    with pytest.raises(OutputError, match=r"README\.md: exists and is not as apreqel wrote it"):
        export(found, Publishing(folder))
    assert os.listdir(folder) == ["README.md"] and card.read_text() == "my own words"
    first = export(found, Publishing(folder, force=True))
    (name,) = first.how
    assert export(found, Publishing(folder)).how == {name: "there already"}
    card.write_text(card.read_text() + "edited")
    with pytest.raises(OutputError, match=r"README\.md"):
        export(found, Publishing(folder))
    with pytest.raises(OutputError, match="is a work folder"):
        export(found, Publishing(done.plan.parent, force=True))
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(done.plan, other / "plan.json")
    (other / "README.md").symlink_to(done.plan)
    with pytest.raises(OutputError, match="is an input"):
        export(found, Publishing(other, force=True))
    assert done.file.exists() and Plan.load(done.plan)


def test_files_without_their_plan(done: Finished, llama_model: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copy(done.file, tmp_path / "alone.gguf"))
    with pytest.raises(ArtifactError, match="give --plan or --workdir"):
        planned_file(alone)
    assert planned_file(alone, workdir=done.plan.parent).plan_path == done.plan
    assert planned_file(alone, plan=done.plan).report is not None
    expect(3, "apreqel did not write it", "export", llama_model, "--to", tmp_path / "x")
    expect(10, "no such plan file", "export", alone, "--to", tmp_path / "x", "--plan", "none.json")
    # Another file's verification is not taken for this one's; a changed file is not the plan's.
    unmeasured = tmp_path / "unmeasured"
    unmeasured.mkdir()
    shutil.copy(done.plan, unmeasured / "plan.json")
    folder = tmp_path / "predicted"
    result = export(planned_file(alone, workdir=unmeasured), Publishing(folder))
    assert not result.measured and any("predictions" in remark for remark in result.remarks)
    assert "## Predicted" in (folder / "README.md").read_text()
    assert "verification.json" not in result.files


def renamed(done: Finished, folder: Path, change: Callable[[GGUFWriter], None]) -> Path:
    """The finished file with another model's metadata, and the plan's digest."""
    folder.mkdir()
    other = read_inventory(models.build(folder / "other.gguf", describe=change))
    plan = Plan.load(done.plan)
    source = read_inventory(done.file)
    header, _ = replace(other, tensors=source.tensors).output_header(
        plan.types, [encode_kv("apreqel.plan", STRING, str(plan.metadata["apreqel.plan"]))]
    )
    (folder / "other.gguf").unlink()
    path = folder / "file.gguf"
    start = source.headers[0].data_start
    path.write_bytes(header + done.file.read_bytes()[start:])
    return path


def test_a_hostile_name_breaks_nothing(done: Finished, tmp_path: Path) -> None:
    path = renamed(done, tmp_path / "in", hostile)
    found = planned_file(path, plan=done.plan)
    assert found.inventory.headers[0].text("general.name") == HOSTILE
    folder = tmp_path / "out"
    result = export(found, Publishing(folder))
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
    (name,) = result.how
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*\.gguf", name) and ".." not in name
    card = (folder / "README.md").read_text()
    front = front_of(card)
    assert front["license"] == "other" and front["license_name"] == "any --- key: value"
    assert "base_model" not in front and "key" not in front and "b" not in front
    assert set(front) == {"library_name", "license", "license_name", "tags"}
    assert front["tags"] == ["gguf", "apreqel", "a: b"]
    title = next(line for line in card.splitlines() if line.startswith("# "))
    assert "<b>" not in card and "\x1b" not in card and "ev\\|il" in title
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    lines = (folder / "Modelfile").read_text().splitlines()
    assert [line for line in lines if not line.startswith(("#", "PARAMETER"))] == [f"FROM ./{name}"]


def test_names_are_cleaned() -> None:
    for text, name in (
        ("../../x", "x"),
        ("--force", "force"),
        ("Qwen2.5 0.5B", "Qwen2.5-0.5B"),
        ("a//b\\c\x00d", "a-b-c-d"),
        ("..", ""),
        ("Überfluß", "Uberflu"),
        (None, ""),
    ):
        assert cleaned(text) == name
    assert escaped("a|b <i>\n*c* https://x") == r"a\|b &lt;i&gt; \*c\* https&colon;//x"
    told = "for /home/me/w/equalised/gemma.gguf and 3 tokens/s, see https://host/a/b; w.apreqel/x.y"
    assert without_paths(told) == "for gemma.gguf and 3 tokens/s, see https://host/a/b; x.y"


def test_front_matter_takes_only_what_it_knows(tmp_path: Path) -> None:
    def parent(writer: GGUFWriter) -> None:
        writer.add_base_model_count(2)
        writer.add_base_model_repo_url(0, "https://huggingface.co/a/b")
        writer.add_base_model_repo_url(1, "https://example.org/c/d")
        writer.add_license("llama3.2")
        writer.add_license_link("https://example.org/LICENSE")

    header = read_inventory(models.build(tmp_path / "p.gguf", describe=parent)).headers[0]
    found = yaml.safe_load(as_yaml(front_matter(header, None, "me: # <x>")).strip("-\n"))
    assert found["base_model"] == "a/b" and found["quantized_by"] == "me: # <x>"
    assert found["license"] == "llama3.2"
    assert found["license_link"] == "https://example.org/LICENSE"
    assert "pipeline_tag" not in found and "language" not in found
    assert front_matter(header, "x/y", None)["base_model"] == "x/y"
    for wrong in ("a/b/c", "https://x/y", "a b", "../x", ""):
        with pytest.raises(UsageError, match="--base-model"):
            front_matter(header, wrong, None)


def test_the_modelfile_has_what_can_be_known(done: Finished) -> None:
    inventory = read_inventory(done.file)
    lines = modelfile("x.gguf", inventory, RunSettings(512, ("Q8_0", "Q8_0"), 3)).splitlines()
    assert lines[1:4] == ["FROM ./x.gguf", "PARAMETER num_ctx 512", "PARAMETER num_thread 3"]
    assert 'PARAMETER stop "<|endoftext|>"' in lines
    assert any("OLLAMA_KV_CACHE_TYPE=q8_0" in line for line in lines)
    assert not any(line.startswith("TEMPLATE") for line in lines)
    mixed = modelfile("x.gguf", inventory, RunSettings(None, ("Q8_0", "F16"), None))
    assert "OLLAMA_KV_CACHE_TYPE" not in mixed and "Q8_0 (K) and F16 (V)" in mixed


def test_the_command_that_asks_again(done: Finished) -> None:
    made = Plan.load(done.plan)
    assert command_of(made, "M.gguf", "r.txt") == (
        "apreqel auto M.gguf --target-bpw=6.0 --any-speed --no-equalise --plain"
    )
    request = PlanRequest(
        prefer="memory",
        max_kld_nats=0.1,
        workload=(100, 10),
        constraints=Constraints([("blk.0.*", "Q8_0")], ["Q8_0"]),
    )
    asked = replace(made.provenance, settings=plain(request))
    assert command_of(replace(made, provenance=asked), "M.gguf", "r.txt") == (
        "apreqel auto M.gguf --prefer=memory --max-kld=0.1 --only-types=Q8_0 "
        "'--pin=blk.0.*=Q8_0' --workload=100:10 --no-equalise"
    )


def test_a_ladder_is_one_folder_with_one_table(done: Finished, tmp_path: Path) -> None:
    model = Path(shutil.copy(done.model, tmp_path / "tiny.gguf"))
    work = tmp_path / "tiny.gguf.apreqel"
    shutil.copytree(done.plan.parent, work)
    expect(10, "holds no ladder", "export", model, "--ladder", "--to", tmp_path / "x")
    made = apreqel("plan", model, "--ladder", 2, "--unchecked", "--plain", "--any-speed", "-q")
    assert made.returncode == 0, made.stderr
    command = ["export", model, "--ladder", "--to", tmp_path / "out", "--tokens", 64, "--no-speed"]
    first = apreqel(*command, "--json")
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout)
    assert len(result["how"]) == 2 and result["measured"]
    card = (tmp_path / "out" / "README.md").read_text()
    for name in result["how"]:
        assert f"**`{name}`**" in card
    assert "## Which one for your device" in card and "Modelfile" not in result["files"]
    kept = json.loads((tmp_path / "out" / "verification.json").read_text())["data"]["files"]
    assert {row["path"] for row in kept[1:]} == set(result["how"])
    sizes = [row["size_bytes"] for row in kept[1:]]
    assert sizes == sorted(sizes)
    again = apreqel(*command)
    assert again.returncode == 0 and "evaluating" not in again.stderr, again.stderr
    assert "quantising" not in again.stderr and "there already" in again.stdout
    assert (tmp_path / "out" / "README.md").read_text() == card
