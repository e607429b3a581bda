"""Personal data and secrets: what is found in English, Chinese and code, what stays, and that twice is once."""

from __future__ import annotations

import codeop
import ipaddress
import re
import statistics
import string
import time
from pathlib import Path
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from benchmarks.curation import personal_data
from data_tools.record import CODE, Record
from data_tools.stages.pii.config import PiiConfig
from data_tools.stages.pii.finding import id_check_digit, placeholder
from data_tools.stages.pii.numbers import luhn
from data_tools.stages.pii.stage import PiiStage
from data_tools.stages.pii.values import is_key_text

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


# --- look-alikes of numbers and addresses, and how they differ ---


@pytest.mark.parametrize(
    "text",
    [
        "The reader starts at offset +268435456 and goes on from there.",
        "--- a/limits.txt\n+++ b/limits.txt\n@@ -1 +1 @@\n-268435456\n+536870912\n",
        "-12025550000\n+12125557890\n",
        "delta of +386 204 117 in, 人口增加了+861 234 567人, z = 1.5 +49 152 118 23, seed=+919293949, +447 000 000",
        "growth of +442079461958 was seen, a surplus of +34 912 345 678 as well",
        "z = 1.5 +49 30 8104 2713",
        "-44 20 7946 1950\n+44 20 7946 1958\n",
        "price 139 1234 5678, 第13912345678号, 1391234567800, x[13912345678:13912345680], 合计13912345678元",
        "Avogadro (called so in 1776-1856), the call of 2009-12-28, phone model of 01.02.2003",
        "call 1-800-998-9938 or 1-900-993-2582",
        "cell phone ring tones 84221111000000",
        "phone model 3310-2000-1",
    ],
)
def test_numbers_with_a_sign_or_another_meaning_stay(text: str) -> None:
    assert clean(text) == (text, {})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("ring +442079461958 after six", "+442079461958"),
        ("Ana +61 412 345 678, Perth", "+61 412 345 678"),
        ("Telefon: 030/901820", "030/901820"),
        ("Tél. 04.78.63.40.40", "04.78.63.40.40"),
        ("ES tel. 912 345 678", "912 345 678"),
        ("(02) 9374 4001 in Sydney", "(02) 9374 4001"),
        ("東京 03-3224-9999", "03-3224-9999"),
        ("電話 2345 6789", "2345 6789"),
        ("Fax: 030 / 8182 3456", "030 / 8182 3456"),
        ("No. HP: 085712345678", "085712345678"),
        ("https://wa.me/5511987654321", "5511987654321"),
        ("☎ 01 42 68 53 00", "01 42 68 53 00"),
        ("มือถือ 089 234 5678", "089 234 5678"),
        ("tel 020 7946 1958 or 07911 123456", "07911 123456"),
        ("电话：（010）62770334", "（010）62770334"),
    ],
)
def test_national_phone_numbers_are_found_as_their_country_writes_them(text: str, value: str) -> None:
    before, _, after = text.partition(value)
    cleaned, counts = clean(text)
    assert value not in cleaned and cleaned.endswith(after) and set(counts) == {"pii.phone"}
    if "or" not in text:
        assert cleaned.startswith(before)


@pytest.mark.parametrize(
    "number", ["+14158672245", "+44 20 7946 1958", "13691477314", "010-62345678", "212-736-5000"]
)
def test_phones_in_code_need_a_word(number: str) -> None:
    named, plain = f'user = {{"mobile": "{number}"}}', f"print('{number}')"
    for text, count in ((named, 1), (plain, 0)):
        record = Record(id="1", text=text, source="s", language=CODE)
        PiiStage(PiiConfig()).process(record)
        assert sum(record.counts.values()) == count, record.text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Reach me at j.smith [at] webhost.com", "j.smith [at] webhost.com"),
        ("mail j.smith(at)webhost(dot)com!", "j.smith(at)webhost(dot)com"),
        ("write to jsmith AT webhost DOT com", "jsmith AT webhost DOT com"),
        ("or mary88 @ webhost.org now", "mary88 @ webhost.org"),
        ('<a href="mailto:jan&#64;onet.pl">', "jan&#64;onet.pl"),
        ("?to=jan%40onet.pl&x", "jan%40onet.pl"),
        ("li@webhost[dot]com", "li@webhost[dot]com"),
        ("Kontakt: müller@bücher.de", "müller@bücher.de"),
        ("li_at_webhost_dot_com", "li_at_webhost_dot_com"),
        ("li&#x40;webhost&#46;com", "li&#x40;webhost&#46;com"),
        ("发到li88@webhost。com", "li88@webhost。com"),
        ("li88@webhost(.)com", "li88@webhost(.)com"),
        ("li@webhost.xn--p1ai", "li@webhost.xn--p1ai"),
        ("<hostyle AT csn.ul.ie>", "hostyle AT csn.ul.ie"),
        ("почта иван@почта.рф", "иван@почта.рф"),
        ("<o'brien@trinity.ie>", "o'brien@trinity.ie"),
        ("Email：ｌｉｎ＠ｙａｈｏｏ．ｃｏｍ。", "ｌｉｎ＠ｙａｈｏｏ．ｃｏｍ"),
    ],
)
def test_emails_written_in_another_way(text: str, value: str) -> None:
    before, _, after = text.partition(value)
    cleaned, counts = clean(text)
    assert cleaned.startswith(before) and cleaned.endswith(after) and value not in cleaned
    assert counts == {"pii.email": 1}


@pytest.mark.parametrize(
    "text",
    [
        "look at amazon dot com",
        "LOOK AT amazon.com",
        "array(at) = value.size",
        "we met at the dot com bubble",
        "2 @ 4.50 each",
        "foo@bar.baz(x)",
        "systemctl start getty@tty1.service user@1000.service crypt@home.mount",
        "call printf@got.plt, brew install openssl@3.rb, icon_40@3x.heic",
        "Buy tickets AT ticketmaster.com now",
        "see 3 (a) www.site.com for more",
    ],
)
def test_what_is_no_email_stays(text: str) -> None:
    assert clean(text) == (text, {})


@pytest.mark.parametrize(
    "text",
    [
        "login from 24.16.8.2",
        "登录IP：１１４．１１４．１１４．１１４",
        "client 8.8.4.4 left",
        "We blocked 45.33.32.156. It came back.",
        "Listen 45.33.32.156:80",
        "[2001:4860:4860::8888]:443",
    ],
)
def test_addresses_by_the_words_around_them(text: str) -> None:
    assert clean(text)[1] == {"pii.ip": 1}


@pytest.mark.parametrize(
    "text",
    [
        "38.17.6.2. Security Considerations",
        "6.10.8.3/1 Conditional feature macros",
        "kernel 5.15.90.1 and 2.6.38.6 are old",
        "the server runs PostgreSQL 14.2.33.100",
        "SQL Server 15.0.200.5",
        "西宁３．２１．４１．１北京３．８２．０１．８",
        "Rule 34.2.1.5 applies",
        "## 20.33.44.55\nFixed in 20.33.44.54.\n[20.33.44.53] - 2024-01-02",
    ],
)
def test_versions_and_sections_are_no_addresses(text: str) -> None:
    assert clean(text) == (text, {})


def test_version_lists_in_code_stay() -> None:
    text = 'SUPPORTED = ["1.12.45.100", "11.0.90.2"]  # see 4.33.1.2\n'
    record = Record(id="1", text=text, source="s", language=CODE)
    PiiStage(PiiConfig()).process(record)
    assert record.text == text


SECRET = "kQ8vZr2LmX5pTn7WcB4yHd1sGf3aJe9uRt6oPi0Y"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (f"[default]\naws_secret_access_key = {SECRET}\n", SECRET),
        (f"AccountKey={SECRET};EndpointSuffix=x", SECRET),
        (f"https://x.com/send?access_token={SECRET}", SECRET),
        (f"Authorization: Bearer {SECRET}", SECRET),
        (f"secret_key = b'{SECRET}'", SECRET),
        ("password: Tr0ub4dor&3\n", "Tr0ub4dor&3"),
        ("密码：abc@2024", "abc@2024"),
        ("postgres://app:x9Kd82Lq@db.internal/x", "x9Kd82Lq"),
    ],
)
def test_secrets_by_the_name_they_are_assigned_to(text: str, value: str) -> None:
    before, _, after = text.partition(value)
    cleaned, counts = clean(text)
    assert cleaned.startswith(before) and cleaned.endswith(after) and value not in cleaned
    assert counts == {"pii.secret": 1}


PASSWORD = "kQ8v!Zr2Lm"


@pytest.mark.parametrize(
    "before",
    [
        "password=", "db_password       = '", '{"passwd":"', 'PASSWORD "', "<password>", "<password>\n    ",
        '<property name="password" value="', 'name: DB_PASSWORD\n  value: "', '"name": "db_password",\n "value": "',
        'variable "db_password" {\n  default = "', "password: |\n  ", '$password ??= "', '$password .= "',
        "setPassword('",
        "define('DB_PASSWORD', '", "IDENTIFIED BY '", "the password for the guest account is ",
        "I changed the password to ", "login admin, password ", "username admin password 0 ", "requirepass ",
        "| password | ", "**Password:** `", 'let password: String = "', 'Password = ConvertTo-SecureString "',
        "Passwort fürs WLAN: ",
        "Kennwort lautet ", "mot de passe : ", "La contraseña es ", "A senha do banco é ", "пароль: ", "hasło - ",
        "パスワードは", "비밀번호: ", "mật khẩu: ", "密码改成", "数据库密码（新）：", "口令 ", "Wachtwoord: ",
        "İ password: ",
    ],
)  # fmt: skip
def test_passwords_however_they_are_given(before: str) -> None:
    closing = {"'": "'", '"': '"', "`": "`", ">": "</password>"}.get(before.rstrip()[-1], "")
    text = f"{before}{PASSWORD}{closing}\nand more"
    cleaned, counts = clean(text)
    assert cleaned == f"{before}YOUR_SECRET{closing}\nand more" and counts == {"pii.secret": 1}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("api_key <- " + f'"{SECRET}"', SECRET),
        (f"- API Key: `{SECRET}`", SECRET),
        (f'var jwtKey = []byte("{SECRET}")', SECRET),
        (f'self.api_key = api_key or "{SECRET}"', SECRET),
        (f"requests.get(u, headers={{'Authorization': 'SSWS {SECRET}'}})", SECRET),
        (f"our secret {SECRET} leaked", SECRET),
        (f"APP_KEY=base64:{SECRET}", SECRET),
        (f'\\"token\\":\\"{SECRET}\\"', SECRET),
        (f"PRIVATE_KEY=0x{'9fceb02d0a1b5e7c' * 4}", f"0x{'9fceb02d0a1b5e7c' * 4}"),
        (f"支付密钥（APIv3）：{SECRET}", SECRET),
        (f'{{"kty":"oct","k":"{SECRET}"}}', SECRET),
        (f"https://{SECRET}@o1.ingest.sentry.io/2", SECRET),
        (f"https://restapi.amap.com/v3/geo?key={SECRET}&q=1", SECRET),
        (f"Set-Cookie: connect.sid=s%3A{SECRET}; Path=/", f"s%3A{SECRET}"),
        ("postgres://a:x9%40Kd82Lq@pg/d", "x9%40Kd82Lq"),
        ("root:x9Kd82Lq@tcp(127.0.0.1:3306)/app", "x9Kd82Lq"),
        ("*:*:*:postgres:x9Kd82Lq", "x9Kd82Lq"),
        ("jdbc:oracle:thin:scott/x9Kd82Lq@//ora:1521/ORCL", "x9Kd82Lq"),
        ("sshpass -p x9Kd82Lq scp a b@h:", "x9Kd82Lq"),
        ("curl -u ci:x9Kd82Lq https://x", "x9Kd82Lq"),
        ("openssl rsa -in k -passin pass:x9Kd82Lq", "x9Kd82Lq"),
        ("echo x9Kd82Lq | docker login -u ci --password-stdin r.io", "x9Kd82Lq"),
        ('http.SetBasicAuth("admin", "x9Kd82Lq")', "x9Kd82Lq"),
        ("x9Kd82Lq! is the password", "x9Kd82Lq!"),
        (f"<key>APIToken</key>\n<string>{SECRET}</string>", SECRET),
        (f'<meta name="api_token" content="{SECRET}">', SECRET),
        (
            "https://hooks.slack.com/services/TABCDEFGH/BABCDEFGH/kQvZrLmXpTnWcByHdsGfaJeu",
            "TABCDEFGH/BABCDEFGH/kQvZrLmXpTnWcByHdsGfaJeu",
        ),
        ("MAIL_PASSWORD=qxzv kbdj wqpf mnrt", "qxzv kbdj wqpf mnrt"),
    ],
)
def test_secrets_by_their_place(text: str, value: str) -> None:
    before, _, after = text.partition(value)
    cleaned, counts = clean(text)
    assert cleaned.startswith(before) and cleaned.endswith(after) and value not in cleaned
    assert counts == {"pii.secret": 1}


@pytest.mark.parametrize(
    "body",
    [
        f"LS0tLS1CRUdJTiBQUklWQVRFIEtFWS0tLS0t{SECRET * 90}",
        f"Private-Lines: 2\n{SECRET}\n{SECRET}\nPrivate-MAC: 1",
        f"---- BEGIN SSH2 ENCRYPTED PRIVATE KEY ----\nComment: k\n{SECRET}\n{SECRET}\n---- END SSH2",
    ],
)
def test_private_keys_of_other_forms(body: str) -> None:
    cleaned, counts = clean(f"tls.key: {body}")
    assert SECRET not in cleaned and "YOUR_PRIVATE_KEY" in cleaned and counts == {"pii.secret": 1}


@pytest.mark.parametrize(
    ("alphabet", "length", "least"),
    [
        (string.ascii_letters, 16, 0.75),
        (string.ascii_letters, 32, 0.93),
        (string.ascii_letters + string.digits, 20, 0.96),
        (string.ascii_lowercase + string.digits, 32, 0.98),
        ("0123456789abcdef", 32, 1.0),
    ],
)
def test_keys_of_few_digits_are_found(alphabet: str, length: int, least: float) -> None:
    """Of keys of 20 letters and digits one in seven has fewer than two digits."""
    rng = Random(0)
    keys = ["".join(rng.choices(alphabet, k=length)) for _ in range(300)]
    assert sum(is_key_text(key, is_quoted=False) for key in keys) >= least * len(keys)


def test_names_are_no_keys() -> None:
    source = "".join(Path(module.__file__).read_text() for module in (statistics, ipaddress, codeop))
    names = set(re.findall(r"[A-Za-z_][A-Za-z_0-9]{15,}", source))
    assert len(names) > 50 and not [name for name in names if is_key_text(name, is_quoted=True)]


@pytest.mark.parametrize(
    "text",
    [
        "password = getpass.getpass(prompt2)",
        "password_encryption = 'scram-sha-256'",
        "self.password = password1",
        "tokenizer_sha256 = '9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08'",
        "PASSWORD=${DB_PASSWORD_2}",
        "the password is required2",
        f"commit {'9fceb02d0a' * 4}",
        "https://user:password@host/x",
        'you can pass "inline=False" to it, pass `x=1`',
        '"minipass": "^7.0.3", "minipass-flush": "~1.0.5"',
        "#include <pwd.h>\n#include <stdint.h>",
        "PPPIOCSPASS = 0x40107447",
        'IDENTIFIED BY "%(password)s"',
        "password_validators = django.contrib.auth.password_validation.MinimumLengthValidator1",
        '["Qwen2OmniToken2WavDiTModel", "Qwen2OmniToken2WavBigVGANModel"]',
        "entering_forward_pass = self._training_state",
        "the pass rate of compass 98B, Forgot your password? Reset it within 24 hours.",
        "credentialsId: 'ff083f76-7804-4ef1-80e4-fe975bb9141b'",
        f"cacheKey: '{SECRET}', nextPageToken: '{SECRET}', publicKey = '{SECRET}'",
        f"certificate-authority-data: LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0tCk{SECRET}",
        "Cookie: _ga=GA1.2.1234567890.0987654321; lang=de",
        "密码必须为8到20位字符, la contraseña debe tener 8 caracteres, пароль не менее 8 символов",
        "pwd: /home/user/src2, the token count is 128000, SECRET_NAME=prod/db2",
        ".. _http-password-mgr:\n\nHTTPPasswordMgr Objects",
        "hf_servingcellpriorityparametersdescription",
        "sk-learn-1-2-3-pipeline-of-many-words",
        'token = "Seamless2TextToUnitDecoderV4"',
        "credentialId: 'ff083f76-7804-4ef1-80e4-fe975bb9141b'",
        f"Cookie: _gcl_au={SECRET}; theme={SECRET}",
        "server_key: k8Q2vZr2LmX5pTn7WcB4.pem",
        "token: `Basic ${Buffer.from('username:password').toString('base64')}`",
        "pass '--size=8GB!' to the tool",
        "func PFXImportCertStore(pfx *Blob, password *uint16)",
        "partition identified by UUID=fe3e1db5-6454-46d6-a14c-071208ebe4b1",
        f"NextToken: '{SECRET}'",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert clean(text) == (text, {})


@pytest.mark.parametrize(
    ("text", "value", "option"),
    [
        ("Social Security number 536-90-4399.", "536-90-4399", "national_id"),
        ("CPF 529.982.247-25", "529.982.247-25", "national_id"),
        ("Passport No. G12345678", "G12345678", "national_id"),
        ("台灣身分證 A123456789", "A123456789", "national_id"),
        ("pay to GB29 NWBK 6016 1331 9268 19 today", "GB29 NWBK 6016 1331 9268 19", "iban"),
    ],
)
def test_documents_of_other_countries_are_an_option(text: str, value: str, option: str) -> None:
    assert clean(text) == (text, {})
    cleaned, counts = clean(text, **{option: True})
    before, _, after = text.partition(value)
    assert cleaned.startswith(before) and cleaned.endswith(after) and value not in cleaned
    assert counts == {f"pii.{option}": 1}
    assert clean(cleaned, **{option: True}) == (cleaned, {})


CASES: dict[str, list[personal_data.Case]] = {}
for each in personal_data.all_cases(range(1)):
    CASES.setdefault(each.kind, []).append(each)


@pytest.mark.parametrize("kind", CASES)
def test_the_sentences_of_the_benchmark(kind: str) -> None:
    """A quick part of what `benchmarks/curation_quality.py --topic personal_data` measures."""
    rates = personal_data.Rates.of(CASES[kind], personal_data.ours)
    assert rates.recall >= 0.95 and rates.precision >= 0.97


def test_sentences_that_no_rule_was_made_for() -> None:
    cases = list(personal_data.all_cases([7], personal_data.UNSEEN))
    rates = personal_data.Rates.of(cases, personal_data.ours)
    assert rates.personal > 200 and rates.recall >= 0.93 and rates.precision >= 0.97
    assert not {case.text for case in cases} & {case.text for cases in CASES.values() for case in cases}


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
    "ann [at] corp (dot) com",
    "tel 912 345 678",
    "password: Tr0ub4dor&3",
    "postgres://app:x9Kd82Lq@db.internal/x",
    f"Private-Lines: 2\n{SECRET}\n{SECRET}\nPrivate-MAC: 1",
    f"Cookie: connect.sid={SECRET}",
    f"密码：{SECRET}",
    "x9Kd82Lq! is the password",
    f"setPassword('{SECRET}')",
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


@given(texts)
@example("ann@corp.com.ann@corp.com")
def test_text_outside_of_what_is_found_is_unchanged(text: str) -> None:
    """One pass replaces the found pieces, in order and without overlaps, and nothing else."""
    stage = PiiStage(PiiConfig(national_id=True, iban=True))
    found = stage._find(text, is_code=False)
    replaced, at, place = stage._replaced(text, found), 0, 0
    for item in found:
        assert at <= item.start < item.end <= len(text)
        gap = text[at : item.start]
        assert replaced[place : place + len(gap)] == gap
        place += len(gap) + len(placeholder(item.form, item.value, b""))
        at = item.end
    assert replaced[place:] == text[at:]
    assert clean(replaced, national_id=True, iban=True)[0] == clean(text, national_id=True, iban=True)[0]


@pytest.mark.parametrize(
    "unit",
    [
        *("1", "1 ", "1.", "a@", "+1-", "a.b-c_", "2001:", "=", "eyJ.", "(0)", "-----BEGIN PRIVATE KEY-----"),
        *(
            "[at]",
            "a at b dot ",
            "%40",
            "a1b2",
            "password=a1",
            "://a:",
            "tel 1",
            "电话1",
            "9.9.9.",
            "１．",
            "@例",
            "AB12",
            "password is ",
            "password\n",
            "api_key: ",
            "token ",
            "key='",
            "密码",
            "cookie: a=b1;",
            "curl -u a:",
            "login('a', 'b",
            "?key=a1",
            "Private-Lines: 1\n",
        ),
    ],
)
def test_long_odd_lines_take_linear_time(unit: str) -> None:
    """A pattern that goes back over it again and again would take minutes."""
    text = unit * (100_000 // len(unit))
    started = time.process_time()
    clean(text, national_id=True, iban=True)
    assert time.process_time() - started < 5
