"""Dialogues as tokens, in fine-tuning data and in prompts to a fine-tuned model: a tokenizer with a chat template.

The template is the one that came with the tokenizer, or else OWN_TEMPLATE:

    [bos]user⏎What is a shard?[eos]assistant⏎A tar file.[eos]user⏎...

The tokens are those that `apply_chat_template` in transformers gives for the template. No content may hold the name of
a special token, which would be read as one there, so a user's text cannot pass for another turn.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

from pretrain.corpus.chat_template import DialogueError, Renderer
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.errors import ConfigError

SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"
ROLES = (SYSTEM, USER, ASSISTANT, TOOL)
OWN_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if tools or message['tool_calls'] or message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('it has no form for tools; give one that has with chat.template=FILE') }}
    {%- endif %}
    {{- message['role'] + '\\n' + message['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'assistant\\n' }}
{%- endif %}
"""
"""The template of a tokenizer that comes without one. Its markers are ordinary text, so a vocabulary need not grow."""

_OPENINGS_KEPT = 64
"""Number of texts before an answer whose tokens a Chat remembers."""

Message = Mapping[str, Any]
"""One turn in the form of OpenAI: `role`, `content` (text; it may be missing beside tool calls) and, where they
are given, `tool_calls`, and `name` and `tool_call_id` of a tool's turn."""


class EncodedDialogue(NamedTuple):
    """A dialogue as a document of a corpus."""

    tokens: list[int]
    targets: list[int]
    """[start, stop, ...]: the tokens that count in the loss."""
    target_bytes: int
    """Size of the targets' text in UTF-8, in bytes, without special tokens."""


class Chat:
    """Writes dialogues as tokens.

    Raises ConfigError where the template cannot be used with the tokenizer: it is no valid template, takes too long, or
    ends an answer with no special token, so that a model would never learn to stop. `date` (YYYY-MM-DD) is what a
    template that writes the date gets for dialogues to train on; prompts get the current one.
    """

    def __init__(self, tokenizer: Tokenizer, template: str = OWN_TEMPLATE, date: str | None = None) -> None:
        self._tokenizer, self._date = tokenizer, date
        self._renderer = Renderer(template, tokenizer.named_tokens)
        special = {name: i for name, i in tokenizer.special_tokens.items() if i != tokenizer.unk_id}
        self._special = special
        longest_first = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._special_name = re.compile("|".join(map(re.escape, longest_first)))
        # Marks stand for contents in a second rendering. No dialogue can hold one, since they are drawn here.
        self._mark_head = f"C{os.urandom(8).hex()}N"
        self._mark = re.compile(f"{self._mark_head}([0-9]{{1,9}})E")
        # What a template writes before an answer is nearly always the same.
        self._encode_opening = lru_cache(_OPENINGS_KEPT)(tokenizer.encode_rendered)
        try:
            self._learn_form()
        except (DialogueError, ConfigError) as error:
            self.close()
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"the chat template is not used: a question with its answer {error}") from error
        self.end_ids = frozenset({special[self._end], tokenizer.eos_id})
        """The ids that end the assistant's turn."""

    def encode_prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """The tokens after which a model writes the assistant's next turn, up to one of `end_ids`.

        They are those that preceded this turn in training. Raises DialogueError where the template refuses the
        messages, or one of them holds the name of a special token.
        """
        self._refuse_special_names(messages, tools)
        now = datetime.now().isoformat()
        text, _ = self._renderer.render(messages, tools, for_answer=True, now=now)
        return self._tokenizer.encode_rendered(text)

    def encode_dialogue(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        loss_roles: Sequence[str] = (ASSISTANT,),
        loss_end: bool = True,
    ) -> EncodedDialogue:
        """The tokens of all turns, and which of them count in the loss: those of the turns of `loss_roles` and, with
        `loss_end`, of the special token that ends each.

        Raises DialogueError where the template refuses the dialogue, leaves out a part of it, or writes it so that the
        turns cannot be told with certainty.
        """
        self._refuse_special_names(messages, tools)
        text, generated = self._renderer.render(messages, tools, now=self._date)
        regions = self._regions(messages, tools, text)
        known = sorted(region for region in regions if region)
        spans = generated if generated and ASSISTANT in loss_roles else []
        for number, message in enumerate(messages):
            is_answer = message["role"] == ASSISTANT
            says_something = _content(message).strip() or message.get("tool_calls")
            if message["role"] in loss_roles and says_something and not (is_answer and generated):
                find = self._answer if is_answer else self._other_turn
                spans.append(find(text, known, regions, number))
        tokens = self._tokenizer.encode_rendered(text)
        boundaries = _Boundaries(self._encode_opening, text, tokens, self._special, self._special_name)
        targets: list[int] = []
        n_bytes = 0
        for start, stop in sorted(spans):
            if not loss_end:
                stop = start + len(self._without_end(text[start:stop]))
            first, last = boundaries.token_at(start), boundaries.token_at(stop)
            if last > first:
                targets += [first, last]
                n_bytes += len(self._special_name.sub("", text[start:stop]).encode())
        return EncodedDialogue(tokens, targets, n_bytes)

    def close(self) -> None:
        """End the process that renders."""
        self._renderer.close()

    def _learn_form(self) -> None:
        """Find out how the template opens and ends an answer, from one with unmistakable contents."""
        question, answer = (f"{role}{os.urandom(8).hex()}" for role in "QA")
        asked, now = [{"role": USER, "content": question}], "2000-01-01"
        answered = [*asked, {"role": ASSISTANT, "content": answer}]
        before = self._renderer.render(asked, now=now).text
        prompt = self._renderer.render(asked, for_answer=True, now=now).text
        text = self._renderer.render(answered, now=now).text
        if not prompt.startswith(before) or not text.startswith(prompt) or text.count(answer) != 1:
            raise DialogueError("does not begin with what asks for the answer, so answers cannot be told")
        at = text.index(answer)
        self._opening = prompt[len(before) :]
        """What the template adds for add_generation_prompt; some templates add nothing."""
        self._question_end = prompt[prompt.index(question) + len(question) :]
        self._lead = text[len(prompt) : at]
        """What it writes between this and the content, which a model has to write itself, such as a space."""
        end = next(self._special_name.finditer(text, at + len(answer)), None)
        if end is None or end[0] not in self._special:
            raise DialogueError(
                "does not end with a special token of the tokenizer, so a model would never learn to stop"
            )
        self._end = end[0]

    def _refuse_special_names(self, messages: Sequence[Message], tools: Any) -> None:
        for text in _strings([messages, tools]):
            if found := self._special_name.search(text):
                raise SpecialTokenError(
                    f"holds {found[0]!r}, the name of a special token, which would be read as that token"
                )

    def _regions(self, messages: Sequence[Message], tools: Any, text: str) -> list[tuple[int, int] | None]:
        """Where `text` holds the content of each message; None for a message without one.

        The template is rendered again with unmistakable contents. What is between these must be between the true ones,
        and nothing else be there.
        """
        marks = {
            n: f"{self._mark_head}{n}E" for n, message in enumerate(messages) if _content(message).strip()
        }
        marked = [{**message, "content": marks.get(n, "")} if n in marks else message
                  for n, message in enumerate(messages)]  # fmt: skip
        written = self._renderer.render(marked, tools, now=self._date).text
        parts = self._mark.split(written)
        between, order = parts[::2], [int(number) for number in parts[1::2]]
        times = Counter(order)
        for number in marks:
            if times[number] != 1:
                what = "writes more than once" if times[number] else "leaves out"
                raise DialogueError(f"has in messages[{number}] a content that the chat template {what}")
        if len(order) != len(marks):
            raise DialogueError("is written in the chat template with parts that cannot be told")
        self._check_tools(messages, tools, text)
        regions: list[tuple[int, int] | None] = [None] * len(messages)
        found, place = [between[0]], len(between[0])
        for number, following in zip(order, between[1:], strict=True):
            content = _content(messages[number])
            forms = (
                content,
                content.strip(),
                content.lstrip(),
                content.rstrip(),
                content.strip("\n"),
                content.lstrip("\n"),
            )
            form = next((form for form in forms if text.startswith(form + following, place)), None)
            if form is None:
                raise DialogueError(f"has in messages[{number}] a content that the chat template changes")
            regions[number] = (place, place + len(form))
            found += [form, following]
            place += len(form) + len(following)
        if "".join(found) != text:
            raise DialogueError("is written in the chat template with parts that cannot be told")
        return regions

    def _check_tools(self, messages: Sequence[Message], tools: Any, text: str) -> None:
        """Raise DialogueError where the template leaves out tools, or what they are called with."""
        if tools and self._renderer.render(messages, now=self._date).text == text:
            raise DialogueError("has tools, which the chat template leaves out")
        for number, message in enumerate(messages):
            for call in message.get("tool_calls") or ():
                function = call["function"]
                other = {**function, "name": f"{function['name']}2"}
                others = [other, {**function, "arguments": {"other": 1}}]
                for changed in others:
                    calls = [
                        {**one, "function": changed} if one is call else one for one in message["tool_calls"]
                    ]
                    again = [{**m, "tool_calls": calls} if n == number else m for n, m in enumerate(messages)]
                    if self._renderer.render(again, tools, now=self._date).text == text:
                        raise DialogueError(
                            f"has in messages[{number}] a tool call that the chat template leaves out"
                        )

    def _answer(
        self,
        text: str,
        known: Sequence[tuple[int, int]],
        regions: Sequence[tuple[int, int] | None],
        number: int,
    ) -> tuple[int, int]:
        """Where `text` holds what a model writes as the assistant's turn `number`, up to the token that ends it.

        `known` are the regions of all contents, in ascending order.
        """
        region = regions[number]
        if region is not None:
            start, written = region
            place = bisect_left(known, region)
            before = text[known[place - 1][1] if place else 0 : start]
            if before.endswith(self._opening + self._lead):
                start -= len(self._lead)
            elif not self._opening or not before.endswith(self._opening):
                raise DialogueError(
                    f"has in messages[{number}] an answer whose beginning cannot be told in the chat template"
                )
        else:
            earlier = [r for r in regions[:number] if r]
            first = earlier[-1][1] if earlier else 0
            later = [r for r in regions[number + 1 :] if r]
            opening = self._opening or self._question_end
            place = text.find(opening, first, later[0][0] if later else len(text))
            alone = sum(r is None for r in regions[max(0, number - 1) : number + 2]) == 1
            if place < 0 or not opening or not alone:
                raise DialogueError(
                    f"has in messages[{number}] a tool call whose beginning cannot be told in the chat template"
                )
            start = written = place + len(opening)
        place = bisect_left(known, max(written, start + 1), key=itemgetter(0))
        following = known[place][0] if place < len(known) else len(text)
        end = text.find(self._end, written, following)
        if end < 0:
            raise DialogueError(
                f"has in messages[{number}] an answer that the chat template does not end with {self._end}"
            )
        return start, end + len(self._end)

    def _other_turn(
        self,
        text: str,
        known: Sequence[tuple[int, int]],
        regions: Sequence[tuple[int, int] | None],
        number: int,
    ) -> tuple[int, int]:
        """Where `text` holds the content of a turn that is not the assistant's, and the special token that follows."""
        region = regions[number]
        if region is None:
            return 0, 0
        start, stop = region
        after = self._special_name.match(text, stop)
        return start, after.end() if after else stop

    def _without_end(self, text: str) -> str:
        """The text of a turn without the special token that ends it."""
        found = list(self._special_name.finditer(text))
        return text[: found[-1].start()] if found and not text[found[-1].end() :].strip() else text


class SpecialTokenError(DialogueError):
    """A dialogue holds the name of a special token."""


class _Boundaries:
    """Finds the token that begins at a place in a text that a template wrote."""

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        text: str,
        tokens: list[int],
        special: Mapping[str, int],
        names: re.Pattern[str],
    ) -> None:
        self._encode, self._text, self._tokens = encode, text, tokens
        found = [
            (match.start(), match.end(), match[0]) for match in names.finditer(text) if match[0] in special
        ]
        ids = {*special.values()}
        self._starts, self._stops = [start for start, _, _ in found], [stop for _, stop, _ in found]
        self._places = [place for place, token in enumerate(tokens) if token in ids]
        if [special[name] for _, _, name in found] != [tokens[place] for place in self._places]:
            raise DialogueError("has special tokens that the tokenizer reads otherwise")

    def token_at(self, place: int) -> int:
        """The number of tokens before a place in the text.

        Tokens are the same up to a special token, whatever follows it. From there on, the text up to `place` is encoded
        by itself, as it is in a prompt, and must give the same tokens. Raises DialogueError where it does not.
        """
        n_special = bisect_right(self._stops, place)
        if n_special and self._stops[n_special - 1] == place:
            return self._places[n_special - 1] + 1
        start, first = (self._starts[n_special - 1], self._places[n_special - 1]) if n_special else (0, 0)
        alone = self._encode(self._text[start:place])
        if self._tokens[first : first + len(alone)] != alone:
            around = self._text[max(start, place - 10) : place + 10]
            raise DialogueError(
                f"has a turn whose beginning the tokenizer joins with the chat template's text before it ({around!r}), "
                "so that a prompt would have other tokens; remove the blanks at its beginning"
            )
        return first + len(alone)


def _content(message: Message) -> str:
    return message.get("content") or ""


def _strings(value: Any) -> Iterator[str]:
    """All texts in a JSON value, keys of objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)
