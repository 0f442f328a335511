"""How a conversation becomes ids: the course's own chat format, or that of another model's tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from llmcourse.tokenization.chat_template import CHAT_TEMPLATE, encode_chat
from llmcourse.tokenization.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, str]]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


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
        self.stop_ids: tuple[int, ...] = (tokenizer.eos_token_id,)

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


def chat_format(tokenizer: Any) -> ChatFormat:
    """The chat format of a tokenizer, ours or one of `transformers`.

    Raises:
        ValueError: it has no chat template.
    """
    if isinstance(tokenizer, Tokenizer) and tokenizer.chat_template == CHAT_TEMPLATE:
        return CourseFormat(tokenizer)
    return TemplateFormat(tokenizer.to_transformers() if isinstance(tokenizer, Tokenizer) else tokenizer)
