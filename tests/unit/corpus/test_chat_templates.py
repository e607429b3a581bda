"""Templates as models have them: the tokens of transformers, answers found exactly, and no way out of the sandbox."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.building.import_tokenizer import import_tokenizer
from data_tools.config import TokenizerConfig
from pretrain.corpus.chat import ASSISTANT, OWN_TEMPLATE, Chat
from pretrain.corpus.chat_template import DialogueError, Renderer, template_in
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.errors import ConfigError
from support.chat_templates import (
    CHATML,
    EOS,
    GENERATION,
    LLAMA_3_DATED,
    MISTRAL,
    QWEN,
    SPECIAL,
    TEMPLATES,
)
from support.hugging_face_tokenizers import byte_level, save

transformers = pytest.importorskip("transformers")

TEXTS = [
    "What is it?",
    "A tar file.",
    " ends with a blank ",
    "道可道 🎉",
    "def f():\n    return 1",
    "<think>",
    "a",
    "[INST",
    "two\n\nlines\n",
]
CONTENTS = st.lists(st.sampled_from(TEXTS), min_size=1, max_size=3).map(" ".join)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Chat, Any, Tokenizer]]]:
    """For each template: ours, the tokenizer of transformers, and our tokenizer."""
    folder, base = tmp_path_factory.mktemp("templates"), byte_level(SPECIAL)
    made = {}
    counting = "{{ '%03d' % (messages[0]['content'] | length) }}" + CHATML
    repeating = "{% if messages[2] %}{{ messages[0]['content'] }}{% endif %}" + CHATML
    open_answers = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
        "{% if loop.last or m.role == 'user' %}{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    odd = {"counting": counting, "repeating": repeating, "open": open_answers}
    for name, template in {**TEMPLATES, "ours": OWN_TEMPLATE, **odd}.items():
        roles = {"bos_token": "<s>", "eos_token": EOS.get(name, "</s>"), "pad_token": "<|pad|>"}
        kind = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
        place = save(base, folder / name, **roles, **kind)
        tokenizer = import_tokenizer(TokenizerConfig(path=str(place)))
        found = template_in(place)
        assert found == template
        made[name] = (Chat(tokenizer, found), transformers.AutoTokenizer.from_pretrained(place), tokenizer)
    yield made
    for chat, _, _ in made.values():
        chat.close()


def turns(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return first + [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]


def texts_of(tokenizer: Tokenizer, tokens: list[int], targets: list[int]) -> list[str]:
    """The text of each span that counts in the loss, special tokens included."""
    special = {i: name for name, i in tokenizer.special_tokens.items()}
    found = []
    for start, stop in zip(targets[::2], targets[1::2], strict=True):
        last = tokens[stop - 1]
        found.append(tokenizer.decode(tokens[start:stop]) + special.get(last, ""))
    return found


@pytest.mark.parametrize("name", [*TEMPLATES, "ours"])
@given(data=st.data())
def test_tokens_are_those_of_transformers(chats: Any, name: str, data: st.DataObject) -> None:
    """The whole dialogue and the prompt; and the prompt is what came before the answer in training."""
    chat, theirs, _ = chats[name]
    contents = data.draw(st.lists(CONTENTS, min_size=2, max_size=4))
    contents = contents[: len(contents) // 2 * 2]
    system = data.draw(st.none() | CONTENTS) if name != "mistral" else None
    messages = turns(*contents, system=system)
    tokens, targets, _ = chat.encode_dialogue(messages)
    assert tokens == theirs.apply_chat_template(messages, return_dict=False)
    prompt = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert chat.encode_prompt(messages[:-1]) == prompt
    assert tokens[: len(prompt)] == prompt and targets[-2] == len(prompt)
    assert len(targets) == len(contents)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", ["A.<|im_end|>", "道🎉<|im_end|>"]),
        ("qwen", ["A.<|im_end|>", "道🎉<|im_end|>"]),
        ("llama-2", [" A. </s>", " 道🎉 </s>"]),
        ("llama-3", ["A.<|eot_id|>", "道🎉<|eot_id|>"]),
        ("mistral", [" A.</s>", " 道🎉</s>"]),
        ("zephyr", ["A.</s>", "道🎉</s>"]),
        ("thinking", ["A.<|im_end|>", "<think>\n\n</think>\n\n道🎉<|im_end|>"]),
        ("generation", ["A.\n", "道🎉\n"]),
        ("ours", ["A.</s>", "道🎉</s>"]),
    ],
)
def test_what_counts_is_what_a_model_writes(chats: Any, name: str, expected: list[str]) -> None:
    chat, _, tokenizer = chats[name]
    tokens, targets, n_bytes = chat.encode_dialogue(turns("Q?", "A.", "Again?", "道🎉"))
    assert texts_of(tokenizer, tokens, targets) == expected
    end = "<|im_end|>" if name == "generation" else EOS.get(name, "</s>")
    assert chat.end_ids == {tokenizer.special_tokens[end], tokenizer.eos_id}
    assert n_bytes == sum(len(text.replace(end, "").encode()) for text in expected)
    without = chat.encode_dialogue(turns("Q?", "A.", "Again?", "道🎉"), loss_end=False)
    assert tokenizer.special_tokens[end] not in {
        without.tokens[at]
        for a, b in zip(without.targets[::2], without.targets[1::2], strict=True)
        for at in range(a, b)
    }
    every = chat.encode_dialogue(turns("Q?", "A."), loss_roles=["user", ASSISTANT])
    assert texts_of(tokenizer, every.tokens, every.targets)[0].startswith("Q?")


def test_generation_blocks_mark_what_transformers_marks(chats: Any) -> None:
    chat, theirs, _ = chats["generation"]
    messages = turns("Q?", "A b c", "Again?", "道🎉", system="S")
    found = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True)
    tokens, targets, _ = chat.encode_dialogue(messages)
    marked = [0] * len(tokens)
    for start, stop in zip(targets[::2], targets[1::2], strict=True):
        marked[start:stop] = [1] * (stop - start)
    assert (found["input_ids"], found["assistant_masks"]) == (tokens, marked)


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Łódź", "days": 2}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
WITH_TOOLS = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "It is sunny."},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "rain"},
    {"role": "tool", "content": "snow"},
    {"role": "assistant", "content": "Rain and snow."},
]


def test_tools_are_written_by_a_template_that_has_them(chats: Any) -> None:
    chat, theirs, tokenizer = chats["qwen"]
    tokens, targets, _ = chat.encode_dialogue(WITH_TOOLS, TOOLS)
    assert tokens == theirs.apply_chat_template(WITH_TOOLS, tools=TOOLS, return_dict=False)
    first, second, third, fourth = texts_of(tokenizer, tokens, targets)
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Łódź", "days": 2}}\n</tool_call>'
    assert (second, fourth) == ("It is sunny.<|im_end|>", "Rain and snow.<|im_end|>")
    assert third == f"Let me look.\n{call}\n{call}<|im_end|>"
    assert first == f"{call}<|im_end|>"


@pytest.mark.parametrize(
    ("name", "messages", "tools", "words"),
    [
        ("ours", WITH_TOOLS, None, "no form for tools"),
        ("ours", turns("a", "b"), TOOLS, "no form for tools"),
        ("chatml", turns("a", "b"), TOOLS, "has tools, which the chat template leaves out"),
        ("chatml", [*turns("a"), {"role": "assistant", "content": "b", "tool_calls": [CALL]}], None, "tool call"),
        ("mistral", turns("a", "b", system="s"), None, r"messages\[0\] a content that the chat template leaves out"),
        ("llama-2", [*turns("a", "b"), *turns("c", "d")[1:]], None, "roles must alternate"),
        ("thinking", [*turns("a"), {"role": "assistant"}], None, "UndefinedError"),
        ("counting", turns("a", "b"), None, "parts that cannot be told"),
        ("chatml", turns("a", "    b"), None, "whose beginning the tokenizer joins"),
        ("repeating", turns("a", "b", "c", "d"), None, r"messages\[0\] a content that the chat template writes more"),
        ("open", turns("a", "b", "c", "d"), None, r"messages\[1\] an answer that .* does not end with"),
    ],
)  # fmt: skip
def test_what_would_be_left_out_or_cannot_be_told_is_refused(
    chats: Any, name: str, messages: Any, tools: Any, words: str
) -> None:
    with pytest.raises(DialogueError, match=words):
        chats[name][0].encode_dialogue(messages, tools)


def test_the_date_is_stated_for_training_and_todays_for_a_prompt(chats: Any) -> None:
    _, theirs, tokenizer = chats["llama-3"]
    chat = Chat(tokenizer, LLAMA_3_DATED, date="2024-07-26")
    assert "Today Date: 26 Jul 2024" in tokenizer.decode(chat.encode_dialogue(turns("a", "b")).tokens)
    today = theirs.apply_chat_template(
        turns("a"), chat_template=LLAMA_3_DATED, add_generation_prompt=True, return_dict=False
    )
    assert chat.encode_prompt(turns("a")) == today
    chat.close()
    with pytest.raises(DialogueError, match=r"current date.*chat\.date="):
        Chat(tokenizer, LLAMA_3_DATED).encode_dialogue(turns("a", "b"))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for", "no valid Jinja"),
        ("{{ 'a' * 10 ** 11 }}", "GiB"),
        ("{% for a in range(10 ** 9) %}x{% endfor %}", "MAX_RANGE"),
        ("{% for a in range(99999) %}{{ 'x' * 999 }}{% endfor %}", "characters"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ namespace(__class__=1) }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ raise_exception('I do not want to') }}", "I do not want to"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "no special token|with a special token"),
        ("{% for m in messages %}{{ m.content | upper }}{{ eos_token }}{% endfor %}", "cannot be told"),
        ("{{ '\\ud800' }}", "surrogate|special token|not used"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_sentence(chats: Any, template: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        Chat(chats["chatml"][2], template)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("the chat template is not used")


def test_a_template_without_end_is_stopped() -> None:
    """By the processor time that it takes, whatever it does with it."""
    nested = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ConfigError, match="took more than 2 s"):
        Renderer(nested, {}).render(turns("a"))


def test_the_process_ends_with_the_one_that_asks(tmp_path: Path) -> None:
    code = (
        "from pretrain.corpus.chat_template import Renderer; import os\n"
        "r = Renderer('{{ messages }}', {}); r.render([]); print(r._process.pid, flush=True); os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    child = int(done.stdout)
    for _ in range(200):
        if (
            not Path(f"/proc/{child}/cmdline").exists()
            or b"chat_sandbox" not in Path(f"/proc/{child}/cmdline").read_bytes()
        ):
            return
        os.sched_yield()
        subprocess.run(["sleep", "0.05"])
    raise AssertionError("it goes on")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"chat_template": [{"name": "tool_use", "template": "x"}]}, "name default"),
        ({"chat_template": 5}, "no text"),
    ],
)
def test_templates_that_are_none(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=words):
        template_in(tmp_path)


def test_the_file_comes_before_the_configuration(tmp_path: Path) -> None:
    assert template_in(tmp_path) is None
    named = [{"name": "default", "template": MISTRAL}, {"name": "tool_use", "template": QWEN}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert template_in(tmp_path) == MISTRAL
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert template_in(tmp_path) == CHATML
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        template_in(tmp_path)


def test_blocks_that_are_changed_afterward_are_refused(chats: Any) -> None:
    template = GENERATION.replace("{% generation %}", "{% set x %}{% generation %}").replace(
        "{% endgeneration %}", "{% endgeneration %}{% endset %}{{ x | trim }}"
    )
    with pytest.raises(ConfigError, match="changed afterward"):
        Chat(chats["generation"][2], template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception.__globals__ }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ ''|attr('__class__') }}",
        "{{ messages|map(attribute='__class__')|first }}",
        "{{ self._TemplateReference__context.__class__ }}",
    ],
)
def test_a_template_sees_no_internals(template: str) -> None:
    renderer = Renderer(template, {})
    with suppress(DialogueError):
        assert renderer.render(turns("a")).text == ""
    renderer.close()
