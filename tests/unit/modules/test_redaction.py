"""No part of a secret is shown, whatever the URL or the command looks like."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from pretrain.config import TrainConfig
from pretrain.redaction import redact, redact_command, redact_url

# Of characters that occur nowhere else here, with all that could end a pattern too early.
_SECRET = st.tuples(
    st.text("Zz", min_size=1, max_size=3), st.text("Zz/:@?#;&=)('\"]>,.+-_%~!", max_size=12)
).map("".join)
_TOKEN = st.text("Zz/:@?#;&=)('\"]>,.+-_~!", min_size=1, max_size=12).filter(lambda text: "Z" in text.upper())


def shows_none(text: str) -> bool:
    return "z" not in text.lower()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://bucket/key is not there", "s3://bucket/key is not there"),
        ("http://127.0.0.1:8000/a%20b", "http://127.0.0.1:8000/a%20b"),
        ("https://me:pa/ss@host/a", "https://***@host/a"),
        ("https://me:secret@host/a?k=v", "https://***@host/a?***"),
        ("https://host/a?sig=s)x&key=k", "https://host/a?***"),
        ("https://host/a#token=t b", "https://host/a#*** b"),
        ("https://host/a;token=t", "https://host/a;***"),
        ("https://host/a?mail=me@host&key=k", "https://***"),
        ("see https%3A%2F%2Fme%3Apw%40host%2Fa%3Fk=v", "see https://***@host%2Fa%3F***"),
        ("see https%253A%252F%252Fme%253Apw%2540host", "see https://***@host"),
        ("simplecache::https://me:pw@host/a", "simplecache::https://***@host/a"),
        ("https://token@host/a?sig=s https://host/b", "https://***@host/a?*** https://host/b"),
        ("write to me@host.org", "write to me@host.org"),
    ],
)
def test_a_url_shows_where_and_no_more(text: str, expected: str) -> None:
    assert redact(text) == expected


@given(_SECRET, _SECRET, _SECRET, st.sampled_from(["s3", "https"]), st.integers(0, 2), st.data())
def test_no_part_of_a_secret_in_a_url_is_shown(
    user: str, query: str, fragment: str, scheme: str, n_quoted: int, data: st.DataObject
) -> None:
    url = f"{scheme}://"
    url += data.draw(st.sampled_from([f"{user}@", f"user:{user}@", ""]))
    url += "host/a/b"
    url += data.draw(st.sampled_from([f"?x=1&sig={query}", f";k={query}", ""]))
    url += data.draw(st.sampled_from([f"#{fragment}", f"#token={fragment}", ""]))
    for _ in range(n_quoted):
        url = quote(url, safe="")
    assert shows_none(redact_url(url))
    assert shows_none(redact(f"cannot open '{url}'; 2 attempts"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["env", "WANDB_API_KEY=k", "python"], ["env", "WANDB_API_KEY=***", "python"]),
        (["a", "--token=k", "--lr=3"], ["a", "--token=***", "--lr=3"]),
        (["a", "--api-key", "k", "--lr", "3"], ["a", "--api-key", "***", "--lr", "3"]),
        (["a", "-password", "-k", "b"], ["a", "-password", "***", "b"]),
        (["a", "+store.apiKey=k", "b"], ["a", "+store.apiKey=***", "b"]),
        (["-H", "Authorization: Bearer k"], ["-H", "Authorization:***"]),
        (["a={token:k}"], ["a={token:***"]),
        (["bash", "-c", "cd x && A_B=1 python --lr=3"], ["bash", "-c", "cd x && A_B=***"]),
        (["bash", "-c", "python --api-key k"], ["bash", "-c", "python --api-key ***"]),
        (["x=https://me:pw@host/a?k=v"], ["x=https://***@host/a?***"]),
        (["a", "tokenizer.path=p", "max_tokens=3"], ["a", "tokenizer.path=p", "max_tokens=3"]),
        (["run_dir=a b", "data.manifest=s3://b/c"], ["run_dir=a b", "data.manifest=s3://b/c"]),
    ],
)
def test_a_command_shows_no_secret_values(words: list[str], expected: list[str]) -> None:
    assert redact_command(words) == expected


@given(
    _TOKEN,
    st.sampled_from(["token", "api-key", "AWS_SECRET_ACCESS_KEY", "hfToken", "db.password"]),
    st.data(),
)
def test_no_part_of_a_secret_in_a_command_is_shown(secret: str, name: str, data: st.DataObject) -> None:
    forms = [
        [f"--{name}={secret}"], [f"--{name}", secret], [f"{name}={secret}"], [f"+{name}='{secret}'"],
        [f"bash -c 'x --{name} {secret}'"], [f"x && {name}={secret} y"], [f'{{"{name}": "{secret}"}}'],
        [f"--{name}", f"{secret} {secret}", "--x"],
    ]  # fmt: skip
    assert shows_none(" ".join(redact_command(["python", *data.draw(st.sampled_from(forms)), "--lr=3"])))


def test_no_key_of_a_run_sounds_like_a_secret() -> None:
    """Else its value would be missing from where command lines are shown."""

    def keys(schema: Any, prefix: str = "") -> list[str]:
        found = []
        for field in fields(schema):
            name = f"{prefix}{field.name}"
            kind = OmegaConf.get_type(OmegaConf.structured(schema), field.name)
            found += keys(kind, f"{name}.") if is_dataclass(kind) else [name]
        return found

    words = [f"{key}=1" for key in keys(TrainConfig)]
    assert len(words) > 5
    assert redact_command(words) == words
