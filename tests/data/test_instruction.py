"""Conversations to ids, masks and batches: by hand, equal to transformers', every option and refusal."""

from __future__ import annotations

import numpy as np
import pytest
import tokenizers
import torch

from llmcourse.data.chat_formats import training_template
from llmcourse.data.instruction import (
    CourseFormat,
    InstructionBatches,
    InstructionSet,
    TemplateFormat,
    chat_format,
    encode_conversation,
    encode_conversations,
    pack,
)
from llmcourse.data.packing import IGNORE
from llmcourse.tokenization.chat_template import CHAT_TEMPLATE
from llmcourse.tokenization.tokenizer import Tokenizer

TEXTS = ["the cat sat on the mat", "where is the cat now", "it sat on the mat in the hall"] * 20


def say(*turns: str) -> list[dict[str, str]]:
    """Messages from "u:..", "a:.." and "s:.." """
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


TWO = say("s:the hall", "u:where is the cat", "a:on the mat", "u:now", "a:it sat")
CHATS = [TWO, say("u:the cat", "a:sat"), say("u:", "a:"), say("u:now", "a:on the mat in the hall", "u:cat")]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 280)


@pytest.fixture(scope="module")
def chat(tokenizer: Tokenizer) -> CourseFormat:
    return CourseFormat(tokenizer)


def learned_text(tokenizer: Tokenizer, ids: list[int], mask: list[bool]) -> str:
    return tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m], skip_special=False)


# Ids and masks


@pytest.mark.parametrize("messages", CHATS)
def test_ids_and_mask_equal_apply_chat_template(tokenizer: Tokenizer, messages: list[dict[str, str]]):
    theirs = tokenizer.to_transformers().apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    expected = (theirs["input_ids"], [bool(m) for m in theirs["assistant_masks"]])
    assert CourseFormat(tokenizer).encode(messages) == expected
    assert TemplateFormat(tokenizer.to_transformers()).encode(messages) == expected
    prompt = tokenizer.to_transformers().apply_chat_template(messages, add_generation_prompt=True)
    assert CourseFormat(tokenizer).prompt(messages) == prompt["input_ids"]
    assert TemplateFormat(tokenizer.to_transformers()).prompt(messages) == prompt["input_ids"]


def test_what_is_learned(tokenizer: Tokenizer, chat: CourseFormat):
    def learned(loss_on: str) -> str:
        return learned_text(tokenizer, *encode_conversation(TWO, chat, loss_on))

    assert learned("assistant") == "on the mat<|end|>it sat<|end|>"
    assert learned("last") == "it sat<|end|>"
    assert learned("all").startswith("<|system|>the hall<|end|><|user|>")
    assert encode_conversation(TWO, chat, "all")[0] == encode_conversation(TWO, chat)[0]
    with pytest.raises(ValueError, match="loss_on='answers'"):
        learned("answers")
    with pytest.raises(ValueError, match="the conversation has no assistant turn"):
        encode_conversation(TWO[:2], chat)


def test_the_format_follows_the_tokenizer(tokenizer: Tokenizer):
    assert isinstance(chat_format(tokenizer), CourseFormat)
    assert isinstance(chat_format(tokenizer.to_transformers()), TemplateFormat)
    foreign = Tokenizer(tokenizer.backend, chat_template="{{ messages[0]['content'] }}")
    assert isinstance(chat_format(foreign), TemplateFormat)
    assert chat_format(tokenizer).stop_ids[0] == tokenizer.special_id("<|end|>")


def test_foreign_templates_that_cannot_serve_are_refused_in_one_line(tokenizer: Tokenizer):
    theirs = tokenizer.to_transformers()
    theirs.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert TemplateFormat(theirs).prompt(TWO)  # answering needs no markers
    with pytest.raises(ValueError, match=r"no \{% generation %\} block") as caught:
        TemplateFormat(theirs).encode(TWO)
    assert "\n" not in str(caught.value)
    theirs.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="refuses this conversation: roles must alternate"):
        TemplateFormat(theirs).prompt(TWO)
    theirs.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        chat_format(theirs)


@pytest.mark.parametrize(
    ("specials", "end"),
    [
        (("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
        (("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
        ((), "<|endoftext|>"),
    ],
)
def test_a_template_without_marks_is_replaced_by_one_of_its_family(
    tokenizer: Tokenizer, specials: tuple[str, ...], end: str
):
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in specials])
    foreign = Tokenizer(backend, chat_template="{{ messages[0]['content'] }}")
    foreign.chat_template = training_template(foreign)
    chat = chat_format(foreign)
    ids, mask = chat.encode(TWO)
    assert learned_text(foreign, ids, mask) == f"on the mat{end}it sat{end}"
    assert chat.stop_ids[0] == foreign.special_id(
        end
    )  # where generation stops is what was learned as the end
    prompt = chat.prompt(TWO[:2])
    assert ids[: len(prompt)] == prompt and mask[len(prompt)]
    assert (
        training_template(foreign) == foreign.chat_template and training_template(tokenizer) == CHAT_TEMPLATE
    )


@pytest.mark.parametrize(
    "written",
    [
        "{% generation %}{{ message['content'] }}<|im_end|>\n{% endgeneration %}",
        "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n",
        "{% generation %}{{ message['content'] }}{% endgeneration %}<|im_end|>\n",
    ],
)
def test_the_end_of_a_turn_is_its_special_token_wherever_the_mark_ends(tokenizer: Tokenizer, written: str):
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens([tokenizers.AddedToken("<|im_end|>", special=True)])
    template = "{% for message in messages %}{{ message['role'] }}\n" + written + "{% endfor %}"
    foreign = Tokenizer(backend, chat_template=template)
    assert chat_format(foreign).stop_ids == (foreign.special_id("<|im_end|>"), foreign.eos_id)


# Data sets


def encode(chat: CourseFormat, chats: list, context_length: int = 64, **options: str) -> InstructionSet:
    return encode_conversations(chats, chat, context_length=context_length, **options)


def test_a_set_holds_inputs_and_shifted_targets(tokenizer: Tokenizer, chat: CourseFormat):
    data = encode(chat, CHATS)
    assert data.counts == {"read": 4, "kept": 4, "shortened": 0, "too_long": 0, "without_answer": 0}
    for index, messages in enumerate(CHATS):
        ids, mask = chat.encode(messages)
        inputs, targets = data.row(index)
        assert inputs.tolist() == ids[:-1]
        assert targets.tolist() == [i if m else IGNORE for i, m in zip(ids[1:], mask[1:], strict=True)]
    assert data.n_targets == sum(sum(chat.encode(m)[1]) for m in CHATS)
    assert encode(chat, CHATS, loss_on="last").n_targets < data.n_targets
    assert encode(chat, CHATS, loss_on="last").checksum != data.checksum == encode(chat, CHATS).checksum


def test_conversations_without_answer_and_too_long_ones_are_counted(chat: CourseFormat):
    data = encode(chat, [say("u:now"), TWO, [], say("u:cat", "a:sat")], context_length=10)
    assert data.counts == {"read": 4, "kept": 1, "shortened": 0, "too_long": 1, "without_answer": 2}
    ids = chat.encode(say("u:cat", "a:sat"))[0]
    assert len(encode(chat, [say("u:cat", "a:sat")], context_length=len(ids) - 1)) == 1
    with pytest.raises(ValueError, match="no conversation is left of 1"):
        encode(chat, [say("u:cat", "a:sat")], context_length=len(ids) - 2)


def test_truncation_by_turns_keeps_the_system_message_and_the_last_exchange(
    tokenizer: Tokenizer, chat: CourseFormat
):
    short = [TWO[0], *TWO[3:]]
    room = len(chat.encode(short)[0]) - 1
    data = encode(chat, [TWO, say("u:cat", "a:sat")], room, truncation="turns")
    assert data.counts["shortened"] == 1 and data.counts["too_long"] == 0
    assert data.row(0)[0].tolist() == chat.encode(short)[0][:-1]
    dropped = encode(chat, [TWO, say("u:cat", "a:sat")], room - 1, truncation="turns")
    assert (dropped.counts["shortened"], dropped.counts["too_long"], len(dropped)) == (0, 1, 1)


def test_truncation_at_the_end_cuts_ids_and_drops_what_has_no_target_left(chat: CourseFormat):
    ids, mask = chat.encode(TWO)
    data = encode(chat, [TWO], len(ids) - 3, truncation="end")
    assert data.row(0)[0].tolist() == ids[:-3] and data.counts["shortened"] == 1
    first = mask.index(True)
    data = encode(chat, [TWO, say("u:cat", "a:sat")], first - 1, truncation="end")
    assert data.counts["too_long"] == 1 and data.counts["kept"] == 1


def test_bad_data_is_refused_with_its_number(chat: CourseFormat):
    with pytest.raises(ValueError, match="conversation 1: unknown role 'tool'"):
        encode(chat, [TWO, [*TWO, {"role": "tool", "content": "x"}]])
    with pytest.raises(ValueError, match="truncation='left'"):
        encode(chat, [TWO], truncation="left")
    with pytest.raises(ValueError, match="context_length=0"):
        encode(chat, [TWO], context_length=0)


# Batches


def many(chat: CourseFormat, n: int = 40) -> InstructionSet:
    rng = np.random.default_rng(0)
    words = "the cat sat on mat in hall now it".split()

    def text() -> str:
        return " ".join(rng.choice(words, rng.integers(1, 12)))

    return encode(chat, [say("u:" + text(), "a:" + text()) for _ in range(n)])


def test_padded_batches_hold_each_conversation_once(chat: CourseFormat):
    data = many(chat)
    source = InstructionBatches(data, batch_size=8, context_length=64, seed=0)
    found = []
    for _ in range(source.batches_per_epoch):
        batch = source.next()
        assert batch.keys() == {"tokens", "targets"} and batch["tokens"].dtype == torch.int64
        assert batch["tokens"].shape[1] % 16 == 0 and batch["tokens"].shape == batch["targets"].shape
        for tokens, targets in zip(batch["tokens"].tolist(), batch["targets"].tolist(), strict=True):
            found.append((tokens, targets))
    expected = {tuple(data.row(i)[0].tolist()): data.row(i)[1].tolist() for i in range(len(data))}
    for tokens, targets in found:
        length = max(i for i, t in enumerate(targets) if t != IGNORE) + 1
        assert expected[tuple(tokens[:length])] == targets[:length]
        assert set(tokens[length:]) <= {data.pad_id} and set(targets[length:]) <= {IGNORE}
    assert len({tuple(tokens) for tokens, _ in found}) == 40


def test_packed_rows_hold_each_conversation_once_apart(chat: CourseFormat):
    data = many(chat)
    source = InstructionBatches(data, batch_size=1, context_length=64, seed=0, packed=True)
    found = []
    for _ in range(source.batches_per_epoch):
        batch = source.next()
        assert batch["tokens"].shape == batch["documents"].shape == (1, 64)
        for document in batch["documents"].unique().tolist():
            slots = batch["documents"][0] == document
            if document >= 0:
                found.append((batch["tokens"][0][slots].tolist(), batch["targets"][0][slots].tolist()))
            else:
                assert set(batch["targets"][0][slots].tolist()) == {IGNORE}
    expected = [(data.row(i)[0].tolist(), data.row(i)[1].tolist()) for i in range(len(data))]
    assert sorted(found) == sorted(expected)
    assert source.fill > 0.9 and source.batches_per_epoch < 20
    mixed = InstructionBatches(data, batch_size=1, context_length=64, seed=0, packed=True, apart=False)
    assert mixed.next().keys() == {"tokens", "targets"}
    torch.testing.assert_close(mixed.at(0)["tokens"], source.at(0)["tokens"])


def test_positions_belong_to_their_data(chat: CourseFormat):
    data, other = many(chat), many(chat, 41)
    state = InstructionBatches(data, batch_size=1, context_length=64, seed=0).state_dict()
    changed = InstructionSet(data.tokens, ~data.learned, data.offsets, data.pad_id, data.counts)
    for wrong, packed in ((other, False), (changed, False), (data, True)):
        with pytest.raises(ValueError, match="the saved batches has"):
            InstructionBatches(wrong, batch_size=1, context_length=64, seed=0, packed=packed).load_state_dict(
                state
            )


def test_bad_batches_are_refused(chat: CourseFormat):
    data = many(chat)
    with pytest.raises(ValueError, match="slots of context_length=8"):
        InstructionBatches(data, batch_size=1, context_length=8, seed=0)
    with pytest.raises(ValueError, match="apart=False needs packed=True"):
        InstructionBatches(data, batch_size=1, context_length=64, seed=0, apart=False)


def test_packing_by_hand_and_its_bound():
    assert pack(np.array([3, 7, 5, 4, 1]), 10) == [[1, 0], [2, 3, 4]]
    lengths = np.random.default_rng(1).integers(1, 60, 500)
    rows = pack(lengths, 100)
    assert sorted(i for row in rows for i in row) == list(range(500))
    assert max(lengths[row].sum() for row in rows) <= 100
    assert len(rows) <= 11 / 9 * -(-lengths.sum() // 100) + 1
    with pytest.raises(ValueError, match="an example of 59 slots does not fit a row of 58"):
        pack(lengths, 58)
