"""Constrained decoding: a finite-state machine over characters, turned into one over tokens.

The machine of a regular expression says, in each state, which characters may come. A token is allowed where all of its
characters can be followed (Willard and Louf, 2023). Which tokens those are is computed once for each state that is
visited and then is a row of a table, so a step costs one masked addition. Text that has been written always is the
beginning of a match, and it ends only where it is one.

JSON schemas become regular expressions by `outlines-core`, regular expressions machines by `interegular`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DEAD = -1


class TokenConstraint:
    """Which tokens may follow, state by state.

    Args:
        pattern: a regular expression that the whole text must match.
        texts: the text of each token id; `None` for an id that must not appear (special tokens, pieces of a character).
        stop_ids: ids that end the text; allowed exactly where it matches.

    Raises:
        ValueError: the pattern is no regular expression, matches nothing, or no token can begin it.
    """

    def __init__(self, pattern: str, texts: Sequence[str | None], stop_ids: Sequence[int]) -> None:
        import interegular

        try:
            self._machine = interegular.parse_pattern(pattern).to_fsm().reduce()
        except Exception as error:  # interegular has several of its own
            raise ValueError(
                f"pattern {pattern!r} is not a regular expression that can be used: {error}"
            ) from None
        if self._machine.empty():
            raise ValueError(f"pattern {pattern!r} matches no text")
        self.pattern, self.texts, self.stop_ids = pattern, list(texts), sorted(set(stop_ids))
        self._next: dict[int, dict[int, int]] = {}  # state -> token -> state
        self._masks: dict[int, Tensor] = {}
        self._alive = self._states_that_can_end()
        self._tree = _prefix_tree(self.texts, set(self.stop_ids))
        self.start: int = self._machine.initial
        if not self._has_every_character():
            self._remove_dead_ends()
        if not self.allowed(self.start):
            raise ValueError(f"pattern {pattern!r}: no token of this vocabulary can begin a match")

    def allowed(self, state: int) -> dict[int, int]:
        """Token -> state after it, for all tokens but the stop ids that may come in a state."""
        if state not in self._next:
            found: dict[int, int] = {}
            open_nodes = [(self._tree, state)]
            while open_nodes:
                node, at = open_nodes.pop()
                for character, (tokens, child) in node.items():
                    after = self._step(at, character)
                    if after in self._alive:
                        found.update((token, after) for token in tokens)
                        open_nodes.append((child, after))
            self._next[state] = dict(sorted(found.items()))
        return self._next[state]

    def may_end(self, state: int) -> bool:
        """Whether the text so far matches."""
        return state in self._machine.finals

    def must_end(self, state: int) -> bool:
        """Whether nothing may follow."""
        return not self.allowed(state)

    def mask(self, state: int, vocab_size: int, device: torch.device | None = None) -> Tensor:
        """What to add to logits (vocab_size,): 0 for what may come, -inf for all else."""
        if state not in self._masks:
            mask = torch.full((vocab_size,), float("-inf"), device=device)
            open_ids = [*self.allowed(state), *(self.stop_ids if self.may_end(state) else ())]
            mask[torch.tensor(open_ids, dtype=torch.int64, device=device)] = 0.0
            self._masks[state] = mask
        return self._masks[state]

    def advance(self, state: int, token: int) -> int:
        """The state after a token.

        Raises:
            ValueError: the token may not come here.
        """
        if token not in self.allowed(state):
            raise ValueError(f"token {token} ({self.texts[token]!r}) may not come in state {state}")
        return self._next[state][token]

    def _step(self, state: int, character: str) -> int:
        machine = self._machine
        return machine.map.get(state, {}).get(machine.alphabet[character], DEAD)

    def _states_that_can_end(self) -> set[int]:
        """States from which characters lead to a match; the others are dead ends."""
        return _that_reach(set(self._machine.finals), self._machine.map)

    def _has_every_character(self) -> bool:
        """Whether each character that may come anywhere is a token, so that tokens get as far as characters do."""
        needed = {
            symbol
            for arrows in self._machine.map.values()
            for symbol, to in arrows.items()
            if to in self._alive
        }
        return needed <= {self._machine.alphabet[text] for text in self.texts if text and len(text) == 1}

    def _remove_dead_ends(self) -> None:
        """Where the vocabulary has gaps: forbid tokens after which no sequence of tokens leads to a match."""
        open_states = [self.start]
        while open_states:
            open_states += [
                after for after in self.allowed(open_states.pop()).values() if after not in self._next
            ]
        good = _that_reach(set(self._machine.finals), self._next)
        for state, arrows in self._next.items():
            self._next[state] = {token: after for token, after in arrows.items() if after in good}


_Tree = dict[str, tuple[list[int], "_Tree"]]


def _prefix_tree(texts: Sequence[str | None], without: set[int]) -> _Tree:
    """The tokens by their characters: each character leads to the tokens that end there and to those that go on."""
    root: _Tree = {}
    for token, text in enumerate(texts):
        if not text or token in without:
            continue
        node = root
        for character in text:
            tokens, node = node.setdefault(character, ([], {}))
        tokens.append(token)
    return root


def _that_reach(goal: set[int], arrows: dict[int, dict[Any, int]]) -> set[int]:
    """States from which the goal can be reached, itself included."""
    found, size = set(goal), -1
    while size < len(found):
        size = len(found)
        found |= {state for state, to in arrows.items() if not found.isdisjoint(to.values())}
    return found


def token_texts(tokenizer: Any) -> list[str | None]:
    """The text of each id of a tokenizer; `None` for special ids and for pieces of a character."""
    special = set(tokenizer.special_ids.values())
    texts: list[str | None] = []
    for token in range(tokenizer.vocab_size):
        text = tokenizer.decode([token])
        texts.append(None if token in special or "�" in text else text)
    return texts


def regex_constraint(pattern: str, tokenizer: Any, stop_ids: Sequence[int] = ()) -> TokenConstraint:
    """A constraint from a regular expression for a tokenizer; its end-of-text id is among the stop ids."""
    return TokenConstraint(pattern, token_texts(tokenizer), [tokenizer.eos_id, *stop_ids])


def json_constraint(schema: dict[str, Any], tokenizer: Any, stop_ids: Sequence[int] = ()) -> TokenConstraint:
    """A constraint from a JSON schema.

    Raises:
        ValueError: the schema cannot be turned into a regular expression.
    """
    from outlines_core.json_schema import build_regex_from_schema

    try:
        pattern = build_regex_from_schema(json.dumps(schema))
    except Exception as error:
        raise ValueError(f"schema {schema}: {error}") from None
    return regex_constraint(pattern, tokenizer, stop_ids)
