"""Personal data and secrets: what is found in English, Chinese and code, what stays, and that twice is once."""

from __future__ import annotations

import codeop
import ipaddress
import re
import statistics
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_tools.record import Record
from data_tools.stages.pii import PiiConfig, PiiStage, id_check_digit, luhn

# Assembled here, so that no scanner of secrets takes this file for a leak.
GITHUB = "ghp_" + "aB3dE5fG7hI9jK1lM2nO4pQ6rS8tU0vW1xY2"
AWS = "AKIA" + "J7QZ5XN2MRT4WVB6"
SLACK = "xoxb-" + "731029384756-918273645012-kQ8vZr2LmX5pTn7WcB4yHd1s"
GOOGLE = "AIza" + "SyD3kF9-bQ7x_LmN2pR5tV8wZ1cE4gH6jK0"
OPENAI = "sk-" + "proj-9fK2mQ7xV4bT1zR8nW3cY6hJ5dL0sP"
JWT = "eyJ" + "hbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P"
PEM = (
    "-----BEGIN RSA PRIVATE KEY-----\n"
    + "MIIEpAIBAAKCAQEA7vQ2hT9wXk3LbN8cRfYj5dUm\n" * 8
    + "-----END RSA PRIVATE KEY-----"
)


def clean(text: str, **options: object) -> tuple[str, dict[str, int]]:
    record = Record(id="1", text=text, source="s")
    assert PiiStage(PiiConfig(**options)).process(record) is None
    return record.text, record.counts


def citizen(region: str, born: str, serial: str) -> str:
    body = region + born + serial
    return body + id_check_digit(body)


def card(body: str) -> str:
    return next(body + digit for digit in "0123456789" if luhn(body + digit))


@pytest.mark.parametrize(
    ("text", "value", "kind"),
    [
        ("Write to jane.doe+news@mail.acme.co.uk.", "jane.doe+news@mail.acme.co.uk", "email"),
        ("我的邮箱是zhang_san88@163.com，欢迎联系", "zhang_san88@163.com", "email"),
        ("ＱＱ邮箱：８１２３４５６＠qq.com。", "８１２３４５６＠qq.com", "email"),
        ("Failed password for root from 61.177.172.13 port 22", "61.177.172.13", "ip"),
        ("服务器地址8.8.4.4，端口53", "8.8.4.4", "ip"),
        ("ip=52.94.236.248", "52.94.236.248", "ip"),
        ("from 2606:4700:20::681a:5c1 to", "2606:4700:20::681a:5c1", "ip"),
        ("That's my number: (808) 782-1557, call me", "(808) 782-1557", "phone"),
        ("call 212.736.5000 now", "212.736.5000", "phone"),
        ("Ring +44 20 7946 1958 after six", "+44 20 7946 1958", "phone"),
        ("Büro: +49 (0)30 8104 2713", "+49 (0)30 8104 2713", "phone"),
        ("价格便宜。Mobile：13691477314。", "13691477314", "phone"),
        ("手机+86 136-9147-7314（微信同号）", "+86 136-9147-7314", "phone"),
        ("联系人李先生１３７７４３２１３２０", "１３７７４３２１３２０", "phone"),
        ("公布了联系电话（０７１７）５４０１２２０、盼有关", "（０７１７）５４０１２２０", "phone"),
        ("传真：010-62345678转802", "010-62345678转802", "phone"),
        ("办公电话01062345678。", "01062345678", "phone"),
        (
            f"身份证号{citizen('110105', '19491231', '002')}，",
            citizen("110105", "19491231", "002"),
            "id_number",
        ),
        (f"card {card('453201511283036')} exp", card("453201511283036"), "bank_card"),
        (f"key {AWS}\n", AWS, "secret"),
        (f"git clone https://{GITHUB}@github.com/a/b", GITHUB, "secret"),
        (f"SLACK={SLACK}", SLACK, "secret"),
        (f"maps?key={GOOGLE}&v=3", GOOGLE, "secret"),
        (f"client = OpenAI('{OPENAI}')", OPENAI, "secret"),
        (f"Authorization: Bearer {JWT}", JWT, "secret"),
        ('API_KEY = "f3b1c9d27e8a46059b7d1c3e5f7a9b2d"', "f3b1c9d27e8a46059b7d1c3e5f7a9b2d", "secret"),
        ("export DB_PASSWORD=q7Wz19xKf83LmPv2Rt5c\n", "q7Wz19xKf83LmPv2Rt5c", "secret"),
    ],
)
def test_each_kind_is_found_and_nothing_around_it(text: str, value: str, kind: str) -> None:
    cleaned, counts = clean(text)
    before, _, after = text.partition(value)
    assert cleaned.startswith(before) and cleaned.endswith(after) and value not in cleaned
    assert counts == {f"pii.{kind}": 1}
    assert clean(text, **{kind: False}) == (text, {})


@pytest.mark.parametrize(
    "text",
    [
        "@property\ndef f(self): return A@B.inv() + x@y.T",
        "git@github.com:owner/project.git and icon@2x.png",
        "root@example.com, anna@mail.example.org, me@localhost, a@printer.local",
        "127.0.0.1, 10.1.2.3, 192.168.0.1, 172.31.0.9, 192.0.2.7, 203.0.113.9, 0.0.0.0, 255.255.255.0",
        "version 81.72.63.54, v81.72.63.54, Chrome/120.0.6099.109, pkg==91.2.3.44, 版本 61.2.3.4",
        "See Section 34.1.2.3 and 4.1.2.3 Scope. OID 1.3.6.1.4.1.311",
        "x[2000::3], std::dec::abc, 12:34:56, fe80::1, ::1, 2001:db8::5, aa:bb:cc:dd:ee:ff",
        "pi = 3.14159265358979323846264338327950288419716939937510",
        "ISBN 978-7-111-40701-0, ISBN 7-302-02368-9, ISSN 1000-1239, 0-306-40615-2",
        "commit 4532015112830366a1b2c3d4e5f60718293a4b5c",
        "assert G1.order() == 19508428800",
        "54*249**(1/2) + 13478400000*I*3**(1/2)",
        "1998 1999 2000 2001 2002 2003\n4532 0151 1283 0366 4532 0151",
        "第一百三十八条 1995年3月18日 国发〔1998〕13号 (2018)京0105民初12345号",
        "Call 1-800-273-8255 or 911; in films 202-555-0143; 400-810-8888",
        "timestamp 1588888888, 1588888888123, 20240131123456, order 12345678901234567890",
        "token = tokenizer.next_token_in_line_of_text\npassword = 'correct-horse-battery-staple'",
        'api_key = "YOUR_API_KEY_GOES_HERE_PLEASE", AKIAIOSFODNN7EXAMPLE, ghp_' + "x" * 36,
        "4111 1111 1111 1111 is the number for tests",
        "a task-list-with-a-very-long-name-1-2-3",
    ],
)
def test_what_only_looks_like_it_stays(text: str) -> None:
    assert clean(text) == (text, {})


def test_what_python_ships_stays() -> None:
    for module in (codeop, statistics, ipaddress):
        text = Path(module.__file__).read_text()
        cleaned, counts = clean(text)
        assert (cleaned, counts) == (text, {})


def test_private_key_keeps_its_frame() -> None:
    cleaned, counts = clean(f"key:\n{PEM}\nend")
    assert cleaned == (
        "key:\n-----BEGIN RSA PRIVATE KEY-----\nYOUR_PRIVATE_KEY\n-----END RSA PRIVATE KEY-----\nend"
    )
    assert counts == {"pii.secret": 1}
    torn, _ = clean(PEM[:200] + " and prose goes on")
    assert "MIIEp" not in torn and torn.endswith("prose goes on")


def test_private_addresses_on_demand() -> None:
    cleaned, counts = clean("10.9.8.77 and fd00:1:2::3 and 192.0.2.1", private_ip=True)
    assert counts == {"pii.ip": 2} and cleaned.endswith("and 192.0.2.1")
    assert "10.9.8.77" not in cleaned and "fd00" not in cleaned


def test_one_value_has_one_placeholder_however_written() -> None:
    text, _ = clean("13691477314, 136 9147 7314, 136-9147-7314, １３６９１４７７３１４")
    assert len(set(text.split(", "))) == 1 and re.fullmatch("1380000[0-9]{4}", text.split(", ")[0])
    one, other = clean("Ann.Lee@corp.com")[0], clean("see ann.lee@CORP.com")[0]
    assert other == f"see {one}"


def test_salt_changes_the_choice() -> None:
    text = " ".join(f"user{i}@corp.com" for i in range(20))
    assert clean(text, salt="a") == clean(text, salt="a") != clean(text, salt="b")


def test_overlapping_kinds_are_one_find() -> None:
    assert clean("13691477314@qq.com")[1] == {"pii.email": 1}
    assert clean(f"api_key = '{AWS}'")[1] == {"pii.secret": 1}


@given(st.text("0123456789", min_size=17, max_size=17), st.integers(0, 16), st.integers(1, 9))
def test_identity_check_digit_sees_every_wrong_digit(body: str, at: int, shift: int) -> None:
    wrong = body[:at] + str((int(body[at]) + shift) % 10) + body[at + 1 :]
    assert id_check_digit(body) != id_check_digit(wrong)


def test_published_check_digits() -> None:
    assert id_check_digit("11010519491231002") == "X"  # the example of GB 11643-1999, annex A
    assert id_check_digit("44052418800101001") == "4"
    assert luhn("79927398713") and luhn("4111111111111111") and not luhn("79927398710")


@given(st.text("0123456789", min_size=12, max_size=18), st.data())
def test_luhn_sees_every_wrong_digit(body: str, data: st.DataObject) -> None:
    number = card(body)
    at = data.draw(st.integers(0, len(number) - 1))
    wrong = number[:at] + str((int(number[at]) + data.draw(st.integers(1, 9))) % 10) + number[at + 1 :]
    assert luhn(number) and not luhn(wrong)


def test_card_needs_checksum_and_issuer() -> None:
    good = card("622202130300392")
    assert clean(f"卡号{good}。")[1] == {"pii.bank_card": 1}
    assert clean(f"卡号{good[:-1]}{(int(good[-1]) + 1) % 10}。")[1] == {}
    assert clean(f"卡号{card('922202130300392')}。")[1] == {}
    spaced = " ".join(good[i : i + 4] for i in range(0, 16, 4))
    assert clean(f"card {spaced}, thanks") == ("card 4111 1111 1111 1111, thanks", {"pii.bank_card": 1})


def test_identity_number_needs_checksum_date_and_province() -> None:
    good = citizen("310104", "19850229"[:6] + "28", "317")
    assert clean(f"证号:{good}")[1] == {"pii.id_number": 1}
    assert clean(f"证号:{good[:17]}{'1' if good[17] != '1' else '2'}")[1] == {}
    for region, born in (("310104", "19850231"), ("990104", "19850228")):
        assert "pii.id_number" not in clean(f"证号:{citizen(region, born, '317')}")[1]


PIECES = [
    "ann@corp.com",
    "zhang@163.com",
    "61.177.172.13",
    "2606:4700:20::681a:5c1",
    "(808) 782-1557",
    "+44 20 7946 1958",
    "13691477314",
    "+86 136-9147-7314",
    "0717-5401220",
    citizen("110105", "19491231", "002"),
    card("453201511283036"),
    AWS,
    GITHUB,
    SLACK,
    OPENAI,
    JWT,
    PEM,
    'api_key = "f3b1c9d27e8a46059b7d1c3e5f7a9b2d"',
]
texts = st.lists(
    st.sampled_from(PIECES) | st.text("0123456789+-.@:() =/电话a\"'\n１", max_size=6), max_size=12
).map("".join)


@given(texts)
@example("+1 +1 808-782-1557 808-782-1557")
def test_twice_changes_nothing_more(text: str) -> None:
    once, _ = clean(text)
    assert clean(once) == (once, {})


@given(st.permutations(PIECES))
def test_the_order_of_values_does_not_matter(pieces: list[str]) -> None:
    together = clean("\n\n".join(pieces))[0]
    assert together == "\n\n".join(clean(piece)[0] for piece in pieces)


@pytest.mark.parametrize(
    "unit",
    ["1", "1 ", "1.", "a@", "+1-", "a.b-c_", "2001:", "=", "eyJ.", "(0)", "-----BEGIN PRIVATE KEY-----"],
)
def test_long_odd_lines_take_linear_time(unit: str) -> None:
    """Half a megabyte; a pattern that goes back over it again and again would take minutes."""
    text = unit * (500_000 // len(unit))
    started = time.process_time()
    clean(text)
    assert time.process_time() - started < 20
