"""How a conversation becomes ids: the course's own chat format, or that of another model's tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from llmcourse.tokenization.chat_template import CHAT_TEMPLATE, encode_chat
from llmcourse.tokenization.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, str]]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


def _marked(begin: str, end: str, answer: str) -> str:
    """A template whose turns are begin, content, end; what the assistant writes, `end` included, is marked."""
    return (
        "{%- for message in messages -%}" + begin + "{%- if message['role'] == 'assistant' -%}"
        "{%- generation -%}{{- message['content'] + " + end + " -}}{%- endgeneration -%}{{- '\n' -}}"
        "{%- else -%}{{- message['content'] + " + end + " + '\n' -}}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- " + answer + " -}}{%- endif -%}"
    )


TRAINING_TEMPLATES = {
    "<|im_start|>": _marked(
        "{{- '<|im_start|>' + message['role'] + '\n' -}}", "'<|im_end|>'", "'<|im_start|>assistant\n'"
    ),
    "<|start_header_id|>": _marked(
        "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' -}}",
        "'<|eot_id|>'",
        "'<|start_header_id|>assistant<|end_header_id|>\n\n'",
    ),
    # a line break after the colon: a space would become part of the answer's first token, which the prompt then lacks
    "": _marked("{{- message['role'] | capitalize + ':\n' -}}", "eos_token", "'Assistant:\n'"),
}
"""templates with generation marks, by a special token that tells the family: ChatML, Llama 3, and for all others plain
text, in which only the end of text is special"""


class ChatFormat(Protocol):
    """How conversations become ids; `chat_format` gives one."""

    pad_id: int
    stop_ids: tuple[int, ...]

    def encode(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Ids of a conversation, and for each whether the assistant writes it."""
        ...

    def prompt(self, messages: Messages) -> list[int]:
        """Ids of a conversation up to where the assistant begins to write."""
        ...


class CourseFormat:
    """The format of `llmcourse.tokenization.chat_template`: no message can forge a turn.

    Raises:
        ValueError: the tokenizer lacks a token of the format.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.pad_id = tokenizer, tokenizer.pad_id
        self.stop_ids: tuple[int, ...] = (tokenizer.special_id("<|end|>"), tokenizer.eos_id)

    def encode(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Ids and mask by `encode_chat`."""
        return encode_chat(self.tokenizer, messages)

    def prompt(self, messages: Messages) -> list[int]:
        """Ids that end with `<|assistant|>`."""
        return encode_chat(self.tokenizer, messages, add_generation_prompt=True)[0]


class TemplateFormat:
    """The format of another model's tokenizer of `transformers`, by its Jinja chat template.

    `transformers` reads special tokens in messages as special: keep untrusted text out of training data made so.

    Raises:
        ValueError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: set tokenizer.chat_template or use another")
        self.tokenizer = tokenizer
        self.pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        ends = (self._end_of_turn(), tokenizer.eos_token_id)
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(end for end in ends if end is not None))

    def _end_of_turn(self) -> int | None:
        """The special token that ends what the assistant writes, if the template marks that; often not EOS.

        Templates disagree on the mark's end: it may come before the token, or after a line break that follows it.
        """
        if not _GENERATION.search(self.tokenizer.chat_template):
            return None
        ids, written = self.encode(_PROBE)
        added = self.tokenizer.added_tokens_decoder
        special = {*self.tokenizer.all_special_ids, *(one for one, token in added.items() if token.special)}
        last = max(place for place, own in enumerate(written) if own)
        inside = [one for one, own in zip(ids, written, strict=True) if own and one in special]
        return next((one for one in [*inside[-1:], *ids[last + 1 : last + 2]] if one in special), None)

    def encode(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Ids and mask by `apply_chat_template`.

        Raises:
            ValueError: the template does not mark what the assistant writes, or refuses the conversation.
        """
        if not _GENERATION.search(self.tokenizer.chat_template):
            raise ValueError(
                "the chat template has no {% generation %} block, so nobody can tell what the assistant writes: put "
                "{% generation %} and {% endgeneration %} around the assistant's text and the token that ends it"
            )
        encoded = self._apply(messages, return_assistant_tokens_mask=True)
        return list(encoded["input_ids"]), [bool(value) for value in encoded["assistant_masks"]]

    def prompt(self, messages: Messages) -> list[int]:
        """Ids with the template's generation prompt.

        Raises:
            ValueError: the template refuses the conversation.
        """
        return list(self._apply(messages, add_generation_prompt=True)["input_ids"])

    def _apply(self, messages: Messages, **options: Any) -> Any:
        from jinja2.exceptions import TemplateError  # needed for foreign templates only

        try:
            rows = [dict(message) for message in messages]
            return self.tokenizer.apply_chat_template(rows, return_dict=True, **options)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from None


def training_template(tokenizer: Tokenizer) -> str:
    """The tokenizer's own chat template if it marks what the assistant writes, else one of its family that does.

    Most published templates have no such marks, and many add a system message of their own; that of
    `TRAINING_TEMPLATES` writes the turns in the same tokens, without it.
    """
    template = tokenizer.chat_template or ""
    if _GENERATION.search(template):
        return template
    family = next(token for token in TRAINING_TEMPLATES if not token or token in tokenizer.special_ids)
    return TRAINING_TEMPLATES[family]


def chat_format(tokenizer: Any) -> ChatFormat:
    """The chat format of a tokenizer, ours or one of `transformers`.

    Raises:
        ValueError: it has no chat template.
    """
    if isinstance(tokenizer, Tokenizer) and tokenizer.chat_template == CHAT_TEMPLATE:
        return CourseFormat(tokenizer)
    return TemplateFormat(tokenizer.to_transformers() if isinstance(tokenizer, Tokenizer) else tokenizer)
