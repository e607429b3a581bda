"""Finds passwords, keys and tokens by the name they are given to: in settings, code, markup, commands and sentences.

The words of names are looked for first, which is fast, and one pattern is then tried at each of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import unquote

from data_tools.stages.pii.finding import PiiMatch, places, spans_around
from data_tools.stages.pii.values import (
    has_odd_letters,
    has_short_pieces,
    is_hexadecimal,
    is_key_text,
    is_password,
    is_random,
)

# A tail, as in `token_value` or `passwordField`, what closes the name, and what leads from it to its value.
_TAIL = (
    r"(?P<tail>[A-Za-z0-9_.-]{0,20})(?P<close>[\\\"'`\]*_]{0,4})"
    r"(?:[ ]?[(（][^()（）\n]{0,24}[)）])?[\u4e00-\u9fff]{0,4}?"
)
_OF = "(?:for|of|to|do|da|de|del|di|para|für|fürs|zum|pour|du|des|von|van|voor|för|dla|для|от|til)"
_TYPE = (
    r"(?:[ ]?:[ ]?(?:const )?&?(?:'static )?\w{3,16}[?!]?(?=[ ]?=)|[ ](?:string|String|text|varchar)(?=[ ]?:?=)"
    r"|\[\d{0,4}\](?=[ ]?=))?"
)
_LINK = (
    r"(?:(?:\s{0,3}|[ \t]{4,24})(?:=>|->|<-|→|={1,3}|(?:\.|\+|\?{1,2}|\|\||:{1,3})=|[:：＝|])[*>]{0,2}"
    r"(?P<assigned>(?:[ ]?[|>][-+]?(?=\n))?[ \t]{0,12}(?:\n[ \t]{1,12})?)"  # TOKEN = VALUE, also on the next line
    r"|(?P<given>(?<=[\"'`])[ ]?,\s{0,2}|,)"  # 'NAME', 'VALUE'
    r"|(?P<called>\()[ ]?"  # setPassword('VALUE')
    r"|[ ]{1,4}(?P<quoted_next>(?=@?[\"']))"  # #define PASSWORD "VALUE", IDENTIFIED BY 'VALUE'
    r"|\"?[ ]?(?P<markup>>)\s{0,12}"  # <password>VALUE</password>
    r"|\"?(?:\s{1,4}|\s?/>\s{1,8}<)(?:android:)?(?:content|connectionString)[ ]?(?P<attribute>=)[ ]?"
    r"|(?P<plist></\w{1,12}>)\s{0,12}<string>"
    r"|\"?(?:[,\s]{1,20}|\s?/>\s{1,8}<)[\"']?(?:android:)?value[\"']?[ ]?(?P<member>[:=])[ ]?"  # name: X, value: Y
    r"|[ ]?\{[^{}]{0,80}?\bdefault[ ]*(?P<default>=)[ ]*"  # variable "password" { default = "VALUE" }
    rf"|(?P<said>(?:[ ]{_OF}[ ][^\n.,:=]{{1,40}}?)?"
    r"(?:[ ](?:is|was|to|est|es|é|è|ist|lautet|är|er|on|jest|je|это|:|is:|are|=|has been)"
    r"(?:[ ](?:now|still))?"
    r"(?:[ ](?:(?:re)?set|changed))?(?:[ ]to)?:?[ ]{1,2}"
    r"|(?:[ ][\w/-]{2,14}){1,2}?[:：][ ]|[ ][-–—][ ]"
    r"|[ ]?(?:是|为|為|は|는|은|이|가|改为|設為|设为|=|:)[ ]?))"
    r"|(?P<beside>[ \t]{1,4}(?:[0-9][ ])?|(?<=[^\x00-\x7f])))"
)
_SCHEME = (
    r"(?:(?:Bearer|Basic|Token|ApiKey|Api-Key|Api-Token|APPCODE|OAuth|Splunk|SSWS|GenieKey|Key|sso-key)[ ])?"
)
_VALUE = (
    rf"(?:(?:(?:\[\]byte|Data|bytes|Buffer\.from|String::from|Secret(?:Str)?|SecureString|unhexlify|fromhex)\("
    rf"|ConvertTo-SecureString (?:-String )?"
    rf"|[\w.]{{1,30}} (?:or|\?\?|\|\|) )?"
    rf"@?[bruf]?\\{{0,3}}(?P<quote>[\"'`]){_SCHEME}(?P<quoted>(?:(?!(?P=quote))[^\s\\]|\\(?!(?P=quote))){{6,4000}})"
    rf"\\{{0,3}}(?P=quote)"
    rf"|{_SCHEME}(?:base64:)?(?P<bare>[a-z]{{4}}(?:[ ][a-z]{{4}}){{3}}(?![ ]?[a-z])|"
    rf"[A-Za-z0-9+/_=.~!@#$%^&*?|-]{{6,4000}}+)(?![({{\[>]))"
)
_PASSWORD = re.compile(
    r"(?:pass(?:w(?:or)?[dt]|phrase|code|ord|e(?=[ :])|(?![a-z]|\.))|pwd|psk|pw(?![a-z])"
    r"|contraseña|clave|senha|kennwort|wachtwoord|has[łl]o|parolă?a?|şifre|heslo|lösenord|adgangskode|salasana|jelszó"
    r"|пароль?|κωδικός|kata sandi|mật khẩu|identified(?:[ ]with[ ]\w{1,30})?[ ]by"
    r"|密码|密碼|口令|授权码|パスワード|비밀번호|암호|รหัสผ่าน|पासवर्ड|كلمة المرور|סיסמה)"
    rf"{_TAIL}{_TYPE}{_LINK}{_VALUE}",
    re.IGNORECASE,
)
_KEY = re.compile(
    r"(?:key(?!board|word|note|space|stone|frame|code|chain|ring|cap|pad|hole|less|up|down|press)"
    r"|token(?!iz)|secret(?!ar|ion|e)|credential(?!s?[_.-]?id)|authorization|auth(?![a-z])|jwt(?![a-z])|appcode"
    r"|密[钥鑰]|秘[钥鑰]|私[钥鑰]|令牌|授权码)"
    rf"{_TAIL}{_TYPE}{_LINK}{_VALUE}",
    re.IGNORECASE,
)
_PASSWORD_WORDS = (
    *"pass pw psk clave senha kennwort wachtwoord parola heslo salasana adgangskode haslo identified".split(),
    "kata sandi",
)
_FOREIGN_PASSWORD_WORDS = (
    *"密码 密碼 口令 授权码 contraseña hasło şifre lösenord jelszó парол κωδικός パスワード 비밀번호 암호".split(),
    *"รหัสผ่าน पासवर्ड סיסמה".split(),
    "mật khẩu",
    "كلمة المرور",
)
_KEY_WORDS = ("key", "token", "secret", "credential", "auth", "jwt", "appcode")
_FOREIGN_KEY_WORDS = ("密钥", "密鑰", "秘钥", "秘鑰", "私钥", "私鑰", "令牌", "授权码")

_IS_THE = (" is the ", " is my ", " is our ", " is your ")
_VALUE_BEFORE = re.compile(r"([A-Za-z0-9@#$%^&*!?_+~-]{8,64}) is (?:the|my|our|your) \Z")
# What stands before `key` where its value is a secret; elsewhere a key finds something, such as a record in a cache.
_KEY_BEFORE = re.compile(
    r"(?:api|app|access|account|private|priv|auth|encryption|encrypt|enc|signing|sign|admin|service"
    r"|server|client|master|session|shared|storage"
    r"|bot|deploy|consumer|license|secret|aes|des|hmac|mch|v3|partner|subscription|rapidapi|ssh|preshared|wep"
    r"|stream|insert"
    r"|query|jwt|cookie|merchant|pay|write|webhook|project|root|instrumentation)"
    r"[ _.-]?\Z|(?-i:[A-Z][A-Z0-9_]{1,30}_\Z)|[?&]\Z",
    re.IGNORECASE,
)
_NO_KEY_BEFORE = re.compile(
    r"cache|primary|foreign|sort|partition|idempot|object|s3[_-]|checksum|hash|sha\d|public|pub[_-]",
    re.IGNORECASE,
)
_NO_WORD_BEFORE = re.compile(
    r"(?:com|by|tres|sur|under|over|next_?-?(?:page)?_?|page_?-?|continuation_?-?|sync_?-?|skip_?-?|public[ _-]?)\Z",
    re.IGNORECASE,
)
_NO_SECRET_NAME = re.compile(
    r"sha[0-9_-]|md5|hash|digest|checksum|tokeniz|tokens|encryption(?!_?-?key)|url|uri|path|file|type|algorithm|scope"
    r"|endpoint|policy|length|len\b|expire|public|cache|primary|foreign|sort_|partition|address|fingerprint|arn|\As[_.-]?id\Z"
    r"|name|version|region|ttl|limit|count|size|field|regex|pattern|prefix|format|class|selector",
    re.IGNORECASE,
)


def find_named_secrets(text: str) -> Iterator[PiiMatch]:
    """What is given to the name of a secret, and what its place shows to be one."""
    is_ascii = text.isascii()
    lower = (
        text.lower() if is_ascii else text.replace("İ", "I").lower()
    )  # the only letter whose length changes
    words = _PASSWORD_WORDS if is_ascii else _PASSWORD_WORDS + _FOREIGN_PASSWORD_WORDS
    for word in [word for word in words if word in lower]:
        end = 0  # of the last value, in which names are part of the value
        for at in places(lower, word):
            span = None
            if at >= end and (match := _PASSWORD.match(text, at)):
                span = _password_span(match)
            if span := span or _said_before(text, at):
                end = span[1]
                yield PiiMatch(*span, "secret", "YOUR_SECRET", "")
    words = _KEY_WORDS if is_ascii else _KEY_WORDS + _FOREIGN_KEY_WORDS
    for word in [word for word in words if word in lower]:
        end = 0
        for at in places(lower, word):
            if at >= end and (match := _KEY.match(text, at)) and (span := _key_span(match, word)):
                end = span[1]
                yield PiiMatch(*span, "secret", "YOUR_SECRET", "")
    yield from _find_by_place(text)


def _said_before(text: str, at: int) -> tuple[int, int] | None:
    """The value in `VALUE is the password`."""
    match = _VALUE_BEFORE.search(text, max(0, at - 90), at) if text.endswith(_IS_THE, 0, at) else None
    if match and is_password(match[1], is_quoted=False) and not _is_word(match[1], is_said=True):
        return match.span(1)
    return None


def _password_span(match: re.Match[str]) -> tuple[int, int] | None:
    text, at = match.string, match.start()
    before = text[max(0, at - 16) : at]
    if _NO_SECRET_NAME.search(match["tail"]) or _NO_WORD_BEFORE.search(before):
        return None
    word = re.match("pass(?![A-Za-z])|pw|psk|", match[0], re.IGNORECASE)[0].lower()
    if before.endswith("require"):  # of Redis
        word = ""
    if word and any(match[link] is not None for link in ("said", "beside", "quoted_next", "given")):
        return None  # to pass something
    is_quoted = match["quoted"] is not None
    needs_quotes = match["given"] or match[0][:10].lower() == "identified"
    if (needs_quotes and not is_quoted) or (match["markup"] and "." in match["tail"]):
        return None  # <pwd.h>
    group = "quoted" if is_quoted else "bare"
    value = match[group]
    if is_hexadecimal(value) and (match["assigned"] is not None or match["member"]):
        return match.span(group)
    if not is_password(value, is_quoted or bool(match["markup"])):
        return None
    if _is_loose(match) and _is_word(value.rstrip(".,!?"), is_said=bool(match["said"])):
        return None
    return _without_end(match, group)


def _is_loose(match: re.Match[str]) -> bool:
    """Whether what follows the name need not be its value."""
    is_beside = match["said"] is not None or match["beside"] is not None or match["called"] is not None
    return (is_beside and match["quoted"] is None) or match["given"] is not None


def _is_word(value: str, is_said: bool) -> bool:
    """Whether a value may be a word of a sentence or a name."""
    if value.isalpha() and len(value) >= 12 and has_odd_letters(value):
        return False
    if re.fullmatch(r"[A-Z]?[a-z]+[-/]?[A-Za-z]*[0-9]{0,2}|[A-Za-z0-9]+(?:[-/_.=][A-Za-z0-9]+)+", value):
        return not has_short_pieces(value, longest=2.6)
    return bool(re.fullmatch("[0-9.:/-]+", value)) or not (is_said or any(map(str.isdigit, value)))


def _key_span(match: re.Match[str], word: str) -> tuple[int, int] | None:
    text, at = match.string, match.start()
    before = text[max(0, at - 32) : at]
    if _NO_SECRET_NAME.search(match["tail"]) or _NO_WORD_BEFORE.search(before):
        return None
    is_quoted = match["quoted"] is not None
    group = "quoted" if is_quoted else "bare"
    value = match[group] if is_quoted else match[group].partition("&")[0]
    if not is_key_text(value, is_quoted):
        return None
    if word == "key" and not _is_name_of_secret(before, value):
        return None
    if word == "auth" and before[-1:].islower() and text[at].islower():
        return None
    if _is_loose(match) and not (
        len(value) >= 16
        and any(map(str.isdigit, value))
        and (has_short_pieces(value, longest=2.6) or is_hexadecimal(value))
    ):
        return None
    return match.start(group), match.start(group) + len(value)


def _is_name_of_secret(before: str, value: str) -> bool:
    """Whether the name that ends in `key` is that of a secret. A key without a further word often finds something."""
    name = re.search(r"[\w.-]*[ ]?\Z", before)[0]
    if _NO_KEY_BEFORE.search(name):
        return False
    if _KEY_BEFORE.search(before):
        return True
    is_mixed = not value.islower() and not value.isupper() and any(map(str.isdigit, value))
    return is_mixed and len(value) >= (20 if re.search(r"[A-Za-z0-9][_-]?\Z", name) else 24)


def _without_end(match: re.Match[str], group: str) -> tuple[int, int]:
    """The value without the end of its sentence, and without what follows it in the address of a page."""
    value = match[group]
    if group == "bare":
        value = re.split(r"&(?=[\w.]{1,40}=)", value)[0].rstrip(".,")
    return match.start(group), match.start(group) + len(value)


# --- by place ---

_IN_URL = re.compile(
    r"://([^\s/:@\"'<>]{0,64}):([^\s/@\"'<>]{3,200})@(?=[A-Za-z0-9\[$({/])"  # NAME:PASSWORD@HOST
    r"|(?<=https)://([A-Za-z0-9_~.-]{20,200})@(?=[A-Za-z0-9])"  # KEY@HOST
)
_IN_ADDRESS = re.compile(
    r"(?<![\w:/.])[\w.-]{1,40}:([^\s:@/\"'<>]{6,80})@(?:tcp|unix|udp)\("  # Go's addresses of databases
    r"|:thin:[\w.-]{1,40}/([^\s@/\"'<>]{6,80})@"  # Oracle's
    r"|snmp-server community[ ]{1,4}([^\s\"']{6,200})"
    r"|^[\w.*-]{1,80}:(?:[0-9]{2,5}|\*):[\w.*-]{1,60}:[\w.*-]{1,60}:(\S{6,200})[ \t]*$",  # a line of ~/.pgpass
    re.MULTILINE,
)
_ADDRESS_SIGNS = (":thin:", ":*:", "5432:", "snmp-server")
_JSON_WEB_KEY = re.compile(r"\"(?:k|d|p|q|dp|dq|qi)\"[ ]?:[ ]?\"([A-Za-z0-9_-]{20,800})\"")
_QUERY_SIGNS = ("key=", "sig=", "ak=", "sk=", "appid=", "signature=", "code=")
_QUERY = re.compile(
    r"[?&](?:sig|signature|key|ak|sk|appid|appkey|code)=([A-Za-z0-9+/%_.-]{20,200}={0,2})(?![A-Za-z0-9+/%])"
)
_COOKIE = re.compile(r"(?i:cookie)[\"']?[ ]?[:=][ ]?[\"']?([^\n]{10,4000})")
_COOKIE_VALUE = re.compile(r"(?<![\w.-])([\w.-]{1,60})=([A-Za-z0-9+/%_.:-]{20,2000}={0,2})")
_NO_COOKIE = re.compile(r"_g|_fb|theme|lang|locale|consent|expires|path|domain|utm", re.IGNORECASE)
# Given to a command: `--password X`, `sshpass -p X`, `-u NAME:X`.
_OPTION = re.compile(
    r"(?:--?(?:[a-z]+-){0,3}(?:password|passwd|passphrase|token|secret|api-key|access-key|storepass|keypass)[ =]"
    r"|sshpass[ ]-p[ ]?|aws_secret_access_key[ ]|ldap\w{1,12}\b[^\n]{0,120}?[ ]-w[ ]"
    r"|(?:mysql|mysqldump|mysqladmin|mariadb|mongo|mongosh|mongodump)\b[^\n]{0,80}?[ ]-p[ ]?|login\b[^\n]{0,80}?"
    r"[ ]-p[ ]?"
    r"|redis-cli\b[^\n]{0,80}?[ ]-a[ ]|openssl[ ]enc\b[^\n]{0,80}?[ ]-k[ ]|smbclient\b[^\n]{0,80}?[ ]-U[ ]?\w{1,40}%"
    r"|secret[ ]set[ ]\w{1,60}[ ](?:-b|--body)[ =]?|net[ ]user[ ]\w{1,40}[ ]|ssh-keygen\b[^\n]{0,80}?[ ]-N[ ]"
    r"|(?:zip|unzip|7za?|rar)\b[^\n]{0,60}?[ ]-[Pp][ ]?|htpasswd\b[^\n]{0,40}?[ ]-\w*b\w*[ ]\S{1,60}[ ]\S{1,60}[ ]"
    r"|useradd\b[^\n]{0,60}?[ ]-p[ ]"
    r"|\b(?:curl|wget|https?)\b[^\n]{0,160}?[ ](?:-u|-a|--user|--auth)[ =]?[\"']?[^\s:\"'/@]{1,80}:)"
    r"[\"']?([^\s\"'`;|&<>]{6,200})"
)
_PIPED = re.compile(
    r"echo[ ](?:-n[ ])?[\"']?(?:[\w-]{1,40}:)?([^\s\"'|]{8,200})[\"']?[ ]\|[^\n]{1,80}?(?:--password-stdin|chpasswd)"
)
# Given to a function after the name of a user or a host: `login("NAME", "PASSWORD")`.
_LOGINS = (
    "asicAuth(",
    "onnect(",
    "onnection(",
    "PDO(",
    "redential",
    "login(",
    "auth=(",
    "auth = (",
    "begin(",
    "_pw_set(",
)
_ARGUMENTS = re.compile(r"[\w= ]{3,20}\(([^()\n]{1,80}?,\s{0,4}[^()\n]{3,160})\)")
_ARGUMENT = re.compile(r"(?<=, )\s{0,4}[\"']([^\s\"'/,]{8,100})[\"']")


def _find_by_place(text: str) -> Iterator[PiiMatch]:
    for start, end in _places_of_secrets(text):
        yield PiiMatch(start, end, "secret", "YOUR_SECRET", "")


def _places_of_secrets(text: str) -> Iterator[tuple[int, int]]:
    if "://" in text and "@" in text:
        for match in _IN_URL.finditer(text):
            if match[3]:
                if is_key_text(match[3], is_quoted=False):
                    yield match.span(3)
            elif match[1] and len(match[1]) >= 20 and is_key_text(match[1], is_quoted=False):
                yield match.span(1)
            elif is_password(match[2], is_quoted=True):
                yield match.span(2)
    if ("@" in text and ("@tcp(" in text or "@unix(" in text)) or any(
        sign in text for sign in _ADDRESS_SIGNS
    ):
        for match in _IN_ADDRESS.finditer(text):
            group = next(group for group in (1, 2, 3, 4) if match[group])
            if is_password(match[group], is_quoted=True):
                yield match.span(group)
    if "=" in text and ("?" in text or "&" in text) and any(sign in text for sign in _QUERY_SIGNS):
        for match in _QUERY.finditer(text):
            if is_key_text(unquote(match[1]), is_quoted=False) or len(match[1]) > 42:
                yield match.span(1)
    if '"kty"' in text:
        for match in _JSON_WEB_KEY.finditer(text):
            if is_random(match[1]):
                yield match.span(1)
    if "ookie" in text:
        for line in _COOKIE.finditer(text):
            for match in _COOKIE_VALUE.finditer(text, *line.span(1)):
                if not _NO_COOKIE.match(match[1]) and is_key_text(unquote(match[2]), is_quoted=False):
                    yield match.span(2)
    signs = [sign for sign in (" -", "net user ", "configure set ") if sign in text]
    options = sorted(at for sign in signs for at in places(text, sign))
    for start, end in spans_around(options, 170, 60):
        for match in _OPTION.finditer(text, start, min(len(text), end + 200)):
            if is_password(match[1], is_quoted=False) or is_key_text(match[1], is_quoted=False):
                yield match.span(1)
    if "-stdin" in text or "chpasswd" in text:
        for match in _PIPED.finditer(text):
            if is_password(match[1], is_quoted=True):
                yield match.span(1)
    if ', "' in text or ", '" in text:
        for at in (at for sign in _LOGINS for at in places(text, sign)):
            if call := _ARGUMENTS.match(text, at):
                for match in _ARGUMENT.finditer(text, *call.span(1)):
                    if is_password(match[1], is_quoted=False) and not _is_word(match[1], is_said=False):
                        yield match.span(1)
