"""Rows of instruction data as they are published, in the shapes of four well-known formats, to messages.

| format | keys |
| --- | --- |
| messages (the Hub's, OpenAI's) | messages: [{role, content}] |
| ShareGPT | conversations: [{from, value}], from human, gpt or system |
| Alpaca (Taori et al., 2023) | instruction, input (may be empty), output; system (may be missing) |
| prompt and completion (TRL's) | prompt, completion: both texts, or both lists of messages |
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Message = dict[str, str]

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def to_messages(row: Mapping[str, Any]) -> list[Message]:
    """The conversation that a row holds, in whichever of the formats above.

    Raises:
        ValueError: the keys are of none of the formats, a message lacks something or is no text, or an unknown
            speaker.
    """
    if "messages" in row:
        return _messages(row["messages"], "role", "content")
    if "conversations" in row:
        turns = _messages(row["conversations"], "from", "value")
        for turn in turns:
            if turn["role"] not in SHAREGPT_ROLES:
                raise ValueError(f"unknown speaker {turn['role']!r}; use one of {', '.join(SHAREGPT_ROLES)}")
        return [turn | {"role": SHAREGPT_ROLES[turn["role"]]} for turn in turns]
    if {"instruction", "output"} <= row.keys():
        parts = [_said("user", part) for part in (row["instruction"], row.get("input")) if part]
        question = "\n\n".join(part["content"] for part in parts)
        system = [_said("system", row["system"])] if row.get("system") else []
        return [*system, _said("user", question), _said("assistant", row["output"])]
    if {"prompt", "completion"} <= row.keys():
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return [_said("user", prompt), _said("assistant", completion)]
        return [message for part in (prompt, completion) for message in _messages(part, "role", "content")]
    raise ValueError(
        f"a row has the keys {sorted(row)}: give messages, conversations, instruction and output, or prompt and "
        "completion"
    )


def read_conversations(path: Path | str) -> tuple[list[list[Message]], Counter[str]]:
    """Read a JSON-lines file of rows in any of the formats, for example one that a learner wrote.

    Returns:
        The conversations, and counts of the lines: "kept", "empty" (blank lines) and "duplicate" (conversations seen
        before, left out).

    Raises:
        ValueError: a line is no JSON object or no row of a known format, with its number; or there are no
            conversations.
    """
    counts: Counter[str] = Counter({"kept": 0, "empty": 0, "duplicate": 0})
    conversations: dict[str, list[Message]] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            counts["empty"] += 1
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("no JSON object")
            messages = to_messages(row)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        key = json.dumps(messages)
        counts["duplicate" if key in conversations else "kept"] += 1
        conversations.setdefault(key, messages)
    if not conversations:
        raise ValueError(f"{path} holds no conversations: write one JSON object a line")
    return list(conversations.values()), counts


def _messages(value: Any, role: str, content: str) -> list[Message]:
    if not isinstance(value, list):
        raise ValueError(f"a conversation is a list of messages, got {str(value)[:60]}")
    for message in value:
        if not isinstance(message, Mapping) or not {role, content} <= message.keys():
            raise ValueError(f"a message needs {role!r} and {content!r}, got {str(message)[:60]}")
    return [_said(message[role], message[content]) for message in value]


def _said(role: str, content: Any) -> Message:
    if not isinstance(content, str):
        raise ValueError(f"what the {role} says is {type(content).__name__}, not text")
    return {"role": role, "content": content}
