"""The YAML at the head of a model card: what the Hugging Face hub reads of a model.

Taken over from the file's general.* metadata as far as it is there and of the form that the hub
knows (hub-docs, modelcard.md); what is not known is left out, never guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence

from apreqel.errors import UsageError, printable
from apreqel.model.gguf_header import GgufHeader
from apreqel.publish.naming import one_line

_IDENTIFIER = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_HUB = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+?)/?")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*")
_TAG = re.compile(r"\w[\w .:+/-]{0,79}")
# Of the hub's tasks those that a GGUF of llama.cpp may serve: converters keep them among the tags.
_TASKS = ("text-generation", "image-text-to-text", "audio-text-to-text", "translation")
_MOST_TAGS = 40
_OWN_TAGS = ("gguf", "apreqel")


def front_matter(
    header: GgufHeader, base_model: str | None, quantized_by: str | None
) -> dict[str, str | list[str]]:
    """By key, in the order of the card. Raises UsageError for a `base_model` of no known form."""
    if base_model is not None and not _IDENTIFIER.fullmatch(base_model):
        raise UsageError(f"--base-model {printable(base_model)!r}: give ORGANISATION/NAME")
    bases = [base_model] if base_model else list(dict.fromkeys(_bases(header)))
    found: dict[str, str | list[str]] = {}
    if bases:
        found["base_model"] = bases[0] if len(bases) == 1 else bases
        found["base_model_relation"] = "quantized"
    if languages := [text for text in _texts(header, "general.languages") if _is(_LANGUAGE, text)]:
        found["language"] = languages
    found["library_name"] = "gguf"
    found |= _license(header)
    tags = [tag for tag in _texts(header, "general.tags") if _is(_TAG, tag)]
    if task := next((tag for tag in tags if tag in _TASKS), None):
        found["pipeline_tag"] = task
    if by := one_line(quantized_by or header.text("general.quantized_by")):
        found["quantized_by"] = by
    found["tags"] = list(dict.fromkeys([*_OWN_TAGS, *tags]))[:_MOST_TAGS]
    return found


def as_yaml(values: Mapping[str, str | list[str]]) -> str:
    """Between its two lines of dashes. Each text is quoted as JSON quotes it, which YAML reads."""
    lines = ["---"]
    for key, value in values.items():
        if isinstance(value, str):
            lines.append(f"{key}: {_quoted(value)}")
        else:
            lines += [f"{key}:", *(f"- {_quoted(text)}" for text in value)]
    return "\n".join([*lines, "---"]) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _is(form: re.Pattern[str], text: str) -> bool:
    return form.fullmatch(text) is not None


def _texts(header: GgufHeader, key: str) -> Sequence[str]:
    value = header.get(key)
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


def _bases(header: GgufHeader) -> Iterator[str]:
    """On the hub: what the file was converted from, or else what its model was made from."""
    for start in ("general.source.", "general."):
        for key in ("repo_url", "url"):
            if found := _HUB.fullmatch(header.text(start + key)):
                yield found[1]
                return
    for i in range(header.integer("general.base_model.count")):
        addresses = (header.text(f"general.base_model.{i}.{key}") for key in ("repo_url", "url"))
        if found := next(filter(None, map(_HUB.fullmatch, addresses)), None):
            yield found[1]


def _license(header: GgufHeader) -> dict[str, str | list[str]]:
    """As it is given; where that is no identifier, as the name of another one."""
    given, name = (one_line(header.text(f"general.license{end}")) for end in ("", ".name"))
    link = header.text("general.license.link")
    found: dict[str, str | list[str]] = {}
    if _is(_LICENSE, given.lower()):
        found["license"] = given.lower()
    elif given or name:
        found["license"], name = "other", name or given
    if found and name:
        found["license_name"] = name
    if found and re.fullmatch(r"(https?://)?[\w./:?=&%#~+-]{1,300}", link):
        found["license_link"] = link
    return found
