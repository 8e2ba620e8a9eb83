"""Hugging Face checkpoints: converted by llama.cpp's converter, from a folder and from a hub.

The hub is a server on this machine. The converter comes with pip, once; what needs it is skipped
where there is no extra `hf`, or no source package to be had.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub import COMMIT, Hub, serving
from support import COMMAND, log_probabilities, tensor_bytes

from apreqel.checkpoint import run_converter
from apreqel.checkpoint.converter import converter_folder
from apreqel.checkpoint.hub import Repository, download, look_up, repository_named
from apreqel.checkpoint.process import Ended
from apreqel.checkpoint.source import checkpoint_source
from apreqel.checkpoint.weights import read_weights
from apreqel.errors import DownloadError, ModelFileError
from apreqel.from_plan import default_output
from apreqel.llama.engine import LoadedModel
from apreqel.progress import silent
from apreqel.workspace import opened

HAS_EXTRA = all(find_spec(name) for name in ("torch", "transformers", "sentencepiece"))
needs_extra = pytest.mark.skipif(not HAS_EXTRA, reason="the extra hf is not installed")
needs_hub = pytest.mark.skipif(
    find_spec("huggingface_hub") is None, reason="huggingface_hub is not installed"
)

TOKEN = "hf_neverToBeSeenAnywhere"
HEADS, KV_HEADS = 4, 2

# In a process of its own: these packages warn of this and that, which pytest makes errors here.
_MAKE = """
import io, sys, json, pathlib
import numpy as np, sentencepiece, torch
from transformers import LlamaConfig, LlamaForCausalLM
texts, folder = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
lines, vocabulary = texts.read_text().splitlines()[:200], io.BytesIO()
sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=vocabulary,
    vocab_size=400, model_type="bpe", byte_fallback=True, minloglevel=2)
config = LlamaConfig(vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
for name in ("bfloat16", "float16", "float32"):
    torch.manual_seed(1)
    model = LlamaForCausalLM(config).to(getattr(torch, name)).eval()
    out = folder / name
    model.save_pretrained(out)
    (out / "tokenizer.model").write_bytes(vocabulary.getvalue())
    (out / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}))
    with torch.no_grad():
        logits = model.float()(torch.arange(5, 45)[None]).logits[0]
    np.save(folder / f"{name}.npy", logits.numpy())
"""


def run(*arguments: object, cwd: Path | None = None, **variables: str) -> Any:
    """The command, which must not say the token, whatever happens."""
    environment = {**os.environ, "HF_TOKEN": TOKEN, **variables}
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, timeout=300, env=environment,
    )  # fmt: skip
    assert TOKEN not in done.stdout + done.stderr
    return done


def refused(code: int, message: str, *arguments: object, **options: Any) -> None:
    """One line with `message`, and this exit code."""
    done = run(*arguments, **options)
    lines = [line for line in done.stderr.splitlines() if line.startswith("apreqel: ")]
    assert done.returncode == code and done.stdout == "", done.stderr
    assert len(lines) == 1 and message in lines[0], done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="session")
def converter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """llama.cpp's converter in a cache of the tests' own, fetched by pip."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        try:
            yield converter_folder(silent)
        except DownloadError as error:
            pytest.skip(f"no source package of llama-cpp-python to be had: {error}")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in three precisions, as transformers saves it, and the logits it gives."""
    if not HAS_EXTRA:
        pytest.skip("the extra hf is not installed")
    folder = tmp_path_factory.mktemp("checkpoints")
    texts = Path(__file__).parent.parent / "calib_data" / "prose.txt"
    subprocess.run([sys.executable, "-c", _MAKE, texts, folder], check=True, capture_output=True)
    return folder


@pytest.fixture
def checkpoint(checkpoints: Path, tmp_path: Path) -> Path:
    """One of one's own."""
    return Path(shutil.copytree(checkpoints / "bfloat16", tmp_path / "tiny"))


def safetensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape and bytes of each tensor."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    entries = json.loads(content[8 : 8 + length])
    data = content[8 + length :]
    return {
        name: (e["dtype"], tuple(e["shape"]), data[slice(*e["data_offsets"])])
        for name, e in entries.items()
        if name != "__metadata__"
    }


def write_safetensors(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    entries, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        entries[name] = {
            "dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]
        }  # fmt: skip
        data += raw
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


# --- a folder ------------------------------------------------------------------------------------


def _of_llama(name: str) -> str:
    """What llama.cpp calls the tensor that transformers calls `name`."""
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    if name in whole:
        return whole[name]
    _, _, layer, *middle, ending = name.split(".")
    return f"blk.{layer}.{parts['.'.join(middle)]}.{ending}"


@pytest.mark.parametrize(
    ("precision", "kind", "nats"),
    # llama.cpp multiplies activations rounded to the weights' type; transformers here does not.
    [("bfloat16", "BF16", 1e-4), ("float16", "F16", 1e-5), ("float32", "F32", 1e-7)],
)
def test_weights_and_logits_are_those_of_the_checkpoint(
    precision: str, kind: str, nats: float, checkpoints: Path, converter: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(checkpoints / precision, tmp_path / "tiny {x}"))
    done = run("inspect", source, "--json")
    assert done.returncode == 0, done.stderr
    gguf = tmp_path / "tiny {x}.apreqel" / f"tiny {{x}}-{kind}.gguf"
    assert json.loads(done.stdout)["n_layers"] == 2
    found = tensor_bytes(gguf)
    expected = safetensors(source / "model.safetensors")
    assert {_of_llama(name) for name in expected} == found.keys()
    numbers = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}[kind]
    for name, (dtype, shape, raw) in expected.items():
        other, values = found[_of_llama(name)]
        assert dtype == kind and other == (kind if len(shape) > 1 else "F32")
        rows = np.frombuffer(raw, numbers).reshape(shape)
        if "q_proj" in name or "k_proj" in name:
            # llama.cpp turns neighbours, transformers the halves of a head.
            n = HEADS if "q_proj" in name else KV_HEADS
            rows = rows.reshape(n, 2, -1, shape[1]).swapaxes(1, 2).reshape(shape)
        if len(shape) == 1:
            wide = rows.astype(np.uint32) << 16 if kind == "BF16" else rows.astype(np.float32)
            assert wide.tobytes() == values
        else:
            assert rows.tobytes() == values
    with LoadedModel(gguf) as model, model.context(40, 1, 2) as context:
        tokens = np.arange(5, 45, dtype=np.int32)[None]
        q = log_probabilities(context.evaluate(tokens, np.arange(40)[None]))
    p = log_probabilities(np.load(checkpoints / f"{precision}.npy"))
    assert (np.exp(p) * (p - q)).sum(axis=1).max() < nats


@needs_extra
def test_a_conversion_is_kept_until_the_checkpoint_changes(
    checkpoint: Path, converter: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tiny.apreqel"
    gguf = folder / "tiny-BF16.gguf"
    assert run("inspect", checkpoint).returncode == 0
    first = gguf.stat()
    assert {p.name for p in folder.iterdir()} == {".lock", "conversion.json", gguf.name}
    done = run("inspect", f"{checkpoint}/")
    assert done.returncode == 0 and "converter" not in done.stderr
    assert gguf.stat().st_ino == first.st_ino
    # What is measured lies there too, and what is made of it beside the checkpoint.
    source = checkpoint_source(str(checkpoint), None, silent)
    assert source is not None and (source.file, source.workdir) == (gguf, folder)
    with opened(str(gguf), source.workdir, allow_requantize=False) as space:
        output = tmp_path / "tiny-BF16-apreqel-accuracy.gguf"
        assert default_output(space, "accuracy") == output
    # A file that is not read changes nothing; one that is does.
    (checkpoint / "notes.py").write_text("raise SystemExit")
    assert "converter" not in run("inspect", checkpoint).stderr
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "rope_theta": 5000.0}))
    done = run("inspect", checkpoint)
    assert done.returncode == 0 and "converter" in done.stderr
    assert gguf.stat().st_ino != first.st_ino
    # Whatever else is at its name is not apreqel's to replace.
    (folder / "conversion.json").unlink()
    refused(7, f"{gguf}: is not apreqel's", "inspect", checkpoint)


@needs_extra
def test_code_of_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    ran, own = tmp_path / "ran", tmp_path / "own"
    own.mkdir()
    (own / "own.py").write_text(
        f"from transformers import LlamaConfig\nopen({str(ran)!r}, 'w').close()\n"
        "class Own(LlamaConfig):\n    model_type = 'own'\n"
    )
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (own / "config.json").write_text(json.dumps(config))
    # A converter that asks for it, as llama.cpp's does for some tokenizers.
    script = tmp_path / "converter.py"
    script.write_text(
        "import sys\nfrom transformers import AutoConfig\n"
        "AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
    )

    def ended(*command: Path) -> Ended:
        done = subprocess.run(
            [sys.executable, *command, own], capture_output=True, text=True,
            env={**os.environ, "HF_HOME": str(tmp_path)},
        )  # fmt: skip
        return Ended(done.returncode, done.stdout, done.stderr)

    shut_out = ended(Path(run_converter.__file__), script)
    assert shut_out.code and "custom code" in shut_out.last_words() and not ran.exists()
    assert ended(script).code == 0 and ran.exists()  # that is what would be


@needs_extra
def test_an_unknown_architecture_is_named(checkpoint: Path, converter: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["architectures"] = ["Nobody\x1b[31mForCausalLM"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    words = r"cannot convert it: Model Nobody\x1b[31mForCausalLM is not supported"
    refused(4, words, "inspect", checkpoint)
    assert not list(checkpoint.with_name("tiny.apreqel").glob("*.gguf"))


def test_what_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    refused(3, "is a folder with neither a GGUF nor a checkpoint's config.json", "inspect", folder)
    (folder / "b.gguf").touch()
    refused(3, "is a folder; give the GGUF in it: b.gguf", "inspect", folder)
    (folder / "config.json").write_text("{}")
    refused(3, "holds no model*.safetensors", "inspect", folder)
    (folder / "adapter_config.json").touch()
    refused(3, "an adapter, not a model", "inspect", folder)
    (folder / "pytorch_model.bin").touch()
    refused(3, "its weights are pickles only (pytorch_model.bin)", "inspect", folder)
    write_safetensors(folder / "model.safetensors", {"a": ("F16", [1, 2], b"1234")})
    refused(3, "a part of a checkpoint; give its folder", "inspect", folder / "model.safetensors")
    for name in ("org/model.gguf", "a/b/c", "./org/model", "org/none.safetensors"):
        refused(3, "no such file", "inspect", name, cwd=tmp_path)
    if not HAS_EXTRA:
        refused(2, "run: pip install 'apreqel[hf]'", "inspect", folder)
        assert not (tmp_path / "model.apreqel").exists()


def test_weights_are_those_that_the_index_names(tmp_path: Path) -> None:
    names = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    for name in names[:2]:
        write_safetensors(tmp_path / name, {name: ("F16", [1, 2], b"1234")})
    with pytest.raises(ModelFileError, match=r"1 of 3 weight files are missing: model-00003-of"):
        read_weights(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict(zip("abc", names, strict=True))}))
    with pytest.raises(ModelFileError, match=r"1 of 3 weight files are missing: model-00003-of"):
        read_weights(tmp_path)
    for bad in (
        "[]",
        "{",
        '{"weight_map": {"a": "../x"}}',
        '{"weight_map": {}}',
        '{"weight_map":[]}',
    ):
        index.write_text(bad)
        with pytest.raises(ModelFileError, match=r"index\.json is damaged .*; download it again"):
            read_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))
    assert [p.name for p in read_weights(tmp_path).files] == names[:2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, cut short or not safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"<html><body>not here</body></html>", "cut short or not safetensors"),
        (struct.pack("<Q", 1 << 62) + b"{}", "cut short or not safetensors"),
        (struct.pack("<Q", 2) + b"[]", "is damaged"),
        (struct.pack("<Q", 10) + b"[" * 10, "is damaged"),
        (struct.pack("<Q", 9) + b'{"a": {}}', "is damaged"),
    ],
)
def test_damaged_safetensors(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelFileError, match=message):
        read_weights(tmp_path)


def test_truncated_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": ("F16", [2, 2], b"12345678")})
    size = path.stat().st_size
    os.truncate(path, size - 3)
    with pytest.raises(ModelFileError, match=f"has {size - 3} bytes, its header says {size}"):
        read_weights(tmp_path)


def test_the_precision_is_that_of_most_weights(tmp_path: Path) -> None:
    def of(*tensors: tuple[str, int]) -> Any:
        size = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "I32": 4}
        write_safetensors(
            tmp_path / "model.safetensors",
            {str(i): (k, [n, 1], b"\0" * n * size[k]) for i, (k, n) in enumerate(tensors)},
        )
        return read_weights(tmp_path)

    for kind in ("F32", "BF16", "F16"):
        assert of((kind, 8)).gguf_type == kind.lower() and not of((kind, 8)).rounded
    mixed = of(("F32", 2), ("BF16", 8))
    assert mixed.gguf_type == "bf16" and mixed.rounded == {"F32": 2}
    mixed = of(("F32", 9), ("BF16", 8))
    assert mixed.gguf_type == "f32" and not mixed.rounded and mixed.gguf_bytes == 68
    quantised = of(("F8_E4M3", 50), ("BF16", 8))
    assert quantised.gguf_type == "bf16" and quantised.rounded == {"F8_E4M3": 50}
    assert of(("I32", 2)).gguf_bytes == 32


@pytest.mark.parametrize(
    ("err", "words"),
    [
        ("INFO: x\nERROR:hf-to-gguf:Model A is not supported\n", "Model A is not supported"),
        (
            "Traceback (most recent call last):\n  File\nKeyError: 'a'\n\nThen\n"
            "Traceback (most recent call last):\n  File x\n    raise\nValueError: b\nmore\n",
            "ValueError: b",
        ),
        ("ERROR: No matching\n\n[notice] new pip\n", "No matching"),
        ("a\x1b[1mb\r\n\n", r"a\x1b[1mb"),
        ("", "no word"),
    ],
)
def test_last_words(err: str, words: str) -> None:
    assert Ended(1, "", err).last_words() == words


# --- a hub ---------------------------------------------------------------------------------------


def test_names_of_repositories() -> None:
    assert repository_named("org/name") == Repository("org/name")
    assert repository_named("org/n.a-m_e@v1.0") == Repository("org/n.a-m_e", "v1.0")
    assert repository_named("org/name@refs/pr/1") == Repository("org/name", "refs/pr/1")
    for other in (
        "name",
        "a/b/c",
        "/a/b",
        "./a",
        "../a",
        "~/a",
        "a/b.gguf",
        "a/b.GGUF",
        "a/",
        "a/b@",
    ):
        assert repository_named(other) is None


@pytest.fixture
def hub(checkpoint: Path) -> Iterator[Hub]:
    (checkpoint / "pytorch_model.bin").write_bytes(b"never")
    (checkpoint / "own.py").write_bytes(b"never")
    with serving(checkpoint, "org/tiny") as hub:
        yield hub


@needs_extra
@needs_hub
def test_a_model_of_the_hub(hub: Hub, converter: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (cache / "apreqel").mkdir(parents=True)
    (cache / "apreqel" / "converter").symlink_to(converter.parent)
    work = tmp_path / "work"
    work.mkdir()
    variables = {
        "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "XDG_CACHE_HOME": str(cache)
    }  # fmt: skip
    done = run("inspect", "org/tiny", cwd=work, **variables)
    assert done.returncode == 0, done.stderr
    assert "downloading org/tiny" in done.stderr and "Traceback" not in done.stderr
    assert hub.fetched("model.safetensors") == [None]
    assert f"Bearer {TOKEN}" in hub.tokens
    for never in ("pytorch_model.bin", "own.py"):
        assert not hub.fetched(never)
    gguf = cache / "apreqel" / "checkpoints" / "org--tiny" / COMMIT / "tiny-BF16.gguf"
    assert (
        tensor_bytes(gguf)["output.weight"][1]
        == (safetensors(hub.folder / "model.safetensors")["lm_head.weight"][2])
    )
    # It is there: nothing is fetched again, also by its commit.
    hub.asked.clear()
    assert run("inspect", f"org/tiny@{COMMIT}", cwd=work, **variables).returncode == 0
    assert not hub.fetched("model.safetensors") and not hub.fetched("config.json")
    # Out of reach: what is cached, the GGUF or the checkpoint.
    for offline in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        done = run("inspect", "org/tiny", cwd=work, **{**variables, **offline})
        assert done.returncode == 0, done.stderr
        assert "org/tiny: the hub is out of reach; as cached" in done.stderr
    shutil.rmtree(gguf.parent)
    offline = {**variables, "HF_HUB_OFFLINE": "1"}
    assert run("inspect", "org/tiny", cwd=work, **offline).returncode == 0 and gguf.exists()
    refused(12, "no whole copy is cached", "inspect", "org/other", cwd=work, **offline)
    # A folder of that name is the folder.
    (work / "org" / "tiny").mkdir(parents=True)
    refused(3, "org/tiny: is a folder with neither", "inspect", "org/tiny", cwd=work, **variables)


@needs_hub
def test_a_download_that_is_cut_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served, name = tmp_path / "served", "model.safetensors"
    served.mkdir()
    (served / "config.json").write_text("{}")
    # The library takes 10 MB at a time.
    write_safetensors(served / name, {"a": ("F16", [1, 12_000_000], bytes(24_000_000))})
    with serving(served, "org/tiny") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        hub.cut = {name}
        tiny, said = Repository("org/tiny"), set[str]()
        found = look_up(tiny, silent)
        assert (found.commit, found.weight_bytes) == (COMMIT, (served / name).stat().st_size)
        assert found.bytes_at_hand() == 0
        folder, commit = download(tiny, found, lambda what, *_: said.add(what))
        whole, rest = hub.fetched(name)
        assert whole is None and rest in ("bytes=10485760-", f"bytes={found.weight_bytes // 2}-")
        assert commit == COMMIT and said == {"downloading org/tiny"}
        assert (folder / name).read_bytes() == (served / name).read_bytes()
        assert found.bytes_at_hand() == found.size_bytes
        # Files that are whole are not fetched again.
        (folder / "config.json").resolve().unlink()
        download(tiny, found, silent)
        assert len(hub.fetched(name)) == 2 and len(hub.fetched("config.json")) == 2
        # Stopped half-way: at once, with nothing left behind.
        shutil.rmtree(tmp_path / "hf")
        hub.stalled = {name}
        with subprocess.Popen([*COMMAND, "inspect", "org/tiny"], stderr=subprocess.PIPE) as command:
            assert hub.is_stalling.wait(60)
            started = time.monotonic()
            command.send_signal(signal.SIGINT)
            _, told = command.communicate()
        assert command.returncode == 130 and b"Traceback" not in told
        assert time.monotonic() - started < 10
        assert not list((tmp_path / "hf").rglob("*.????????.incomplete"))


@needs_hub
def test_what_the_hub_refuses(tmp_path: Path) -> None:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with serving(folder, "org/tiny") as hub:
        variables = {
            "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)
        }  # fmt: skip

        def says(code: int, message: str, name: str = "org/tiny", **more: str) -> None:
            refused(code, message, "inspect", name, cwd=tmp_path, **{**variables, **more})

        says(3, "org/tiny on the hub: holds no model*.safetensors")
        (folder / "pytorch_model.bin").touch()
        says(3, "its weights are pickles only (pytorch_model.bin)")
        (folder / "tiny-Q4_0.gguf").touch()
        says(3, "holds GGUF files; download one and give its path: tiny-Q4_0.gguf")
        write_safetensors(folder / "model.safetensors", {"a": ("F16", [1, 2], b"1234")})
        says(12, "org/other: neither a file here nor a repository on the hub", "org/other")
        says(12, "org/tiny: no revision v2 on the hub", "org/tiny@v2")
        says(2, "no name of a repository", "org/a--b")
        hub.is_gated = True
        says(12, "gated; ask for access on its page on the hub; the token in HF_TOKEN was used")
        says(12, "no token is set (HF_TOKEN, or: hf auth login)", HF_TOKEN="")
        hub.is_private = True
        (tmp_path / "token").write_text(TOKEN)
        says(12, "or a private one; the token of the stored login was used", HF_TOKEN="")
    says(12, "org/tiny: no whole copy is cached, and the hub cannot be reached")
