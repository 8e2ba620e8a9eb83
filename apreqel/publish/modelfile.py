"""Ollama's Modelfile: the file, how long a context, how many threads, where an answer ends.

TEMPLATE is never written. Ollama's templates are Go's and a GGUF's is Jinja: one cannot be told
from the other without a guess, and a template given there would displace the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator

from apreqel.llama.flags import RunSettings
from apreqel.model.inventory import Inventory

_END_KEYS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
_CHAT_TEMPLATE = "tokenizer.chat_template"
# llama_token_type: control
_CONTROL = 3


def modelfile(file: str, inventory: Inventory, settings: RunSettings) -> str:
    """`file` is the GGUF's name in the same folder."""
    lines = ["# ollama create NAME -f Modelfile", f"FROM ./{file}"]
    lines += [f"PARAMETER {name} {value}" for name, value in settings.ollama_parameters.items()]
    if settings.ollama_caches:
        lines.append(f"# {settings.ollama_caches}.")
    if inventory.headers[0].text(_CHAT_TEMPLATE):
        lines += [
            "# No TEMPLATE: the file has the model's own chat template, which newer versions of",
            "# Ollama run as it is. Older ones take a known one that is like it; where",
            "# ollama show --template says only {{ .Prompt }}, they know none.",
        ]
        lines += [f'PARAMETER stop "{token}"' for token in end_tokens(inventory)]
    else:
        lines.append("# No TEMPLATE: the model has no chat template; prompts are sent as they are.")
    return "\n".join(lines) + "\n"


def end_tokens(inventory: Inventory) -> list[str]:
    """Control tokens that the file names as an end and that its chat template writes."""
    header = inventory.headers[0]
    template, found = header.text(_CHAT_TEMPLATE), list(_ends(inventory))
    return [text for text in dict.fromkeys(found) if text in template]


def _ends(inventory: Inventory) -> Iterator[str]:
    """Their texts; one that a Modelfile cannot hold in quotes is left to llama.cpp, which knows."""
    header = inventory.headers[0]
    tokens, kinds = header.get("tokenizer.ggml.tokens"), header.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not isinstance(kinds, list):
        return
    for key in _END_KEYS:
        number = header.integer(key, -1)
        if 0 <= number < min(len(tokens), len(kinds)) and kinds[number] == _CONTROL:
            text = str(tokens[number])
            if text.isprintable() and text.strip() == text != "" and '"' not in text:
                yield text
