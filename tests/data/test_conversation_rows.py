"""Published shapes of instruction data: each to the same messages, files with their line numbers, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmcourse.data.conversation_rows import read_conversations, to_messages

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
ROWS = [
    {"messages": CHAT, "id": 3},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
    {"instruction": "hi", "output": "yo"},
    {"instruction": "hi", "input": "", "output": "yo"},
    {"prompt": "hi", "completion": "yo"},
    {"prompt": CHAT[:1], "completion": CHAT[1:]},
]


@pytest.mark.parametrize("row", ROWS)
def test_every_format_gives_the_same_conversation(row: dict[str, Any]):
    assert to_messages(row) == CHAT


def test_alpaca_input_and_system():
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief."}
    assert [message["content"] for message in to_messages(row)] == ["Be brief.", "Add.\n\n1 2", "3"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "hi"}, r"a row has the keys \['text'\]"),
        ({"messages": [{"role": "user"}]}, "a message needs 'role' and 'content'"),
        ({"messages": ["hi"]}, "a message needs 'role' and 'content', got hi"),
        ({"conversations": [{"from": "bing", "value": "x"}]}, "unknown speaker 'bing'"),
        ({"prompt": "hi", "completion": None}, "a conversation is a list of messages, got hi"),
        ({"instruction": 7, "output": "x"}, "what the user says is int, not text"),
        ({"instruction": "hi", "output": 3}, "what the assistant says is int, not text"),
    ],
)
def test_bad_rows_are_refused(row: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        to_messages(row)


def test_a_file_is_read_and_counted(tmp_path: Path):
    path = tmp_path / "mine.jsonl"
    other = {"prompt": "no\u2028w", "completion": "it sat"}
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in [*ROWS[:2], other]) + "\n\n")
    conversations, counts = read_conversations(path)
    assert conversations == [CHAT, to_messages(other)]
    assert counts == {"kept": 2, "duplicate": 1, "empty": 2}
    path.write_text(json.dumps(ROWS[0]) + "\n{'messages'")
    with pytest.raises(ValueError, match=r"mine.jsonl, line 2: Expecting property name"):
        read_conversations(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="line 1: no JSON object"):
        read_conversations(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no conversations"):
        read_conversations(path)
