"""The chat format: how a conversation becomes one text for the model.

A turn is the token of its role, the message, and `<|end|>`; there is no white space between turns, so every
token is either the author's or one of the eight special tokens:

    <|system|>Be brief.<|end|><|user|>2 + 2?<|end|><|assistant|>4<|end|>

The format exists twice: `render_chat` is the definition to read, `CHAT_TEMPLATE` is the same in Jinja, the
form in which a tokenizer carries its format to `transformers`, trainers and servers. The `{% generation %}`
block marks what the assistant writes, `<|end|>` included, since the model must learn to stop: the mask of the
training loss comes from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmcourse.tokenization.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('unknown role ' + message['role'] + '; use system, user or assistant') -}}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- message['content'] + '<|end|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def render_chat(messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False) -> str:
    """Write a conversation as one text, equal to what `apply_chat_template` of `transformers` writes.

    The text is for reading and for tools that expect it. A message that contains the letters `<|end|>` looks
    in it like the end of a turn: to get ids, use `encode_chat`, which keeps the two apart.

    Args:
        messages: mappings with "role" (system, user or assistant) and "content".
        add_generation_prompt: end with `<|assistant|>`, the place where the model answers.

    Raises:
        ValueError: an unknown role, or a message without role or content.

    >>> render_chat([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    '<|user|>Hi<|end|><|assistant|>'
    """
    turns = [f"<|{role}|>{content}<|end|>" for role, content in map(_role_and_content, messages)]
    return "".join(turns) + ("<|assistant|>" if add_generation_prompt else "")


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False
) -> tuple[list[int], list[bool]]:
    """Return the ids of a conversation, and for each id whether the assistant writes it.

    Special tokens come from the structure alone, never from the content of a message, so nobody can close a
    turn or open a system turn by typing its name. For content without such names, the ids are those of
    `render_chat`.

    Args:
        tokenizer: one whose special tokens include the roles and `<|end|>`.
        messages: as in `render_chat`.
        add_generation_prompt: as in `render_chat`.

    Raises:
        ValueError: as in `render_chat`; or the tokenizer lacks a token of the format.
    """
    ids: list[int] = []
    written: list[bool] = []
    for role, content in map(_role_and_content, messages):
        body = [*tokenizer.encode(content), tokenizer.special_id("<|end|>")]
        ids += [tokenizer.special_id(f"<|{role}|>"), *body]
        written += [False] + [role == "assistant"] * len(body)
    if add_generation_prompt:
        ids.append(tokenizer.special_id("<|assistant|>"))
        written.append(False)
    return ids, written


def _role_and_content(message: Mapping[str, str]) -> tuple[str, str]:
    """Take a message apart, or say what is wrong with it."""
    if not {"role", "content"} <= message.keys():
        raise ValueError(f"a message needs 'role' and 'content'; this one has {sorted(message)}")
    if message["role"] not in ROLES:
        raise ValueError(f"unknown role {message['role']!r}; use {', '.join(ROLES[:-1])} or {ROLES[-1]}")
    return message["role"], message["content"]
