"""Text that is streamed is the text that the tokens decode to, up to the first text to stop at."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.corpus.tokenizer import Tokenizer
from pretrain.generation.text import TextStream
from support.trained_run import train_tokenizer

TEXT = "In 1813 道可道 naïve 👩‍👩‍👧 It is a truth ##stop## universally acknowledged"
ids = st.lists(st.integers(3, 299), max_size=40)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """It writes many characters as several tokens of one byte."""
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def pieces(tokenizer: Tokenizer, prompt: list[int], tokens: list[int], *stop: str) -> tuple[list[str], bool]:
    """The pieces that a reader gets, and whether the text was stopped."""
    stream = TextStream(tokenizer, prompt, stop)
    found = []
    for token in tokens:
        found.append(stream.add(token))
        if stream.stopped:
            break
    return [*found, stream.finish()], stream.stopped


def test_a_text_arrives_in_pieces_that_are_whole_characters(tokenizer: Tokenizer) -> None:
    found, stopped = pieces(tokenizer, [1], tokenizer.encode(TEXT))
    assert "".join(found) == TEXT
    assert not any("\ufffd" in piece for piece in found)
    assert sum(map(bool, found)) > 10
    assert not stopped


@given(prompt=ids, tokens=ids)
def test_all_pieces_are_the_text_of_all_tokens(
    tokenizer: Tokenizer, prompt: list[int], tokens: list[int]
) -> None:
    """Also where the tokens are bytes that are no characters."""
    context = [1, *prompt][-16:]
    found, _ = pieces(tokenizer, [1, *prompt], tokens)
    whole = tokenizer.decode_after(context, tokens)
    if "\ufffd" not in tokenizer.decode(context) + whole:
        assert "".join(found) == whole
    assert "".join(found).replace("\ufffd", "") == whole.replace("\ufffd", "")


@given(tokens=ids, data=st.data())
def test_nothing_from_the_stop_on_is_given_out(
    tokenizer: Tokenizer, tokens: list[int], data: st.DataObject
) -> None:
    whole = "".join(pieces(tokenizer, [1], tokens)[0])
    stops = data.draw(st.lists(st.text(min_size=1, max_size=3), max_size=2))
    if whole:
        start = data.draw(st.integers(0, len(whole) - 1))
        stops.append(whole[start : start + data.draw(st.integers(1, 6))])
    places = [(at + len(stop), at) for stop in stops if (at := whole.find(stop)) >= 0]
    found, stopped = pieces(tokenizer, [1], tokens, *stops)
    assert stopped == bool(places)
    assert "".join(found) == whole[: min(places, default=(0, len(whole)))[1]]


def test_of_two_stops_the_one_that_is_complete_first_counts(tokenizer: Tokenizer) -> None:
    for stop, text in ((["abc", "b"], "xa"), (["bc", "abc"], "x"), (["b", "ab"], "x")):
        assert "".join(pieces(tokenizer, [1], tokenizer.encode("xabc"), *stop)[0]) == text
        letters = [token for letter in "xabc" for token in tokenizer.encode(letter)]
        assert "".join(pieces(tokenizer, [1], letters, *stop)[0]) == text


def test_a_beginning_of_the_stop_is_held_back_until_it_is_none(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, [1], ["ab!"])
    found = [stream.add(token) for token in tokenizer.encode("a") + tokenizer.encode("bc")]
    assert found[0] == ""
    assert "".join(found) == "abc"
    assert stream.finish() == ""
