"""Finds keys, tokens and passwords: by their form, or by the name they are assigned to.

The forms are those of gitleaks' default rules (MIT, github.com/gitleaks/gitleaks, config/gitleaks.toml, July 2026) and
of detect-secrets' plugins (Apache-2.0, github.com/Yelp/detect-secrets, 1.5), and for services that neither knows, those
of the documentation of the service.
"""

from __future__ import annotations

import base64
import math
import re
from collections import Counter
from collections.abc import Iterator

from data_tools.stages.pii.finding import PiiMatch, places, spans_around

# <w> is a letter or digit, <b> one of base64 for addresses, <h> a hexadecimal digit. The name of a group becomes the
# placeholder.
_FORMS = r"""
(?<![A-Za-z0-9_-])(?:
  (?P<AWS_ACCESS_KEY>(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16})
| (?P<GITHUB_TOKEN>gh[pousr]_<w>{36,251}|github_pat_[A-Za-z0-9_]{40,255})
| (?P<SLACK_TOKEN>xox[abeoprs]-[A-Za-z0-9-]{20,250}|xapp-[0-9]-[A-Za-z0-9-]{20,250}|xoxe\.xox[bp]-<b>{20,250})
| (?P<GOOGLE_API_KEY>AIza<b>{35}|GOCSPX-<b>{28}|ya29\.<b>{30,400})
| (?P<API_KEY>sk-<b>{20,250})                 # OpenAI, Anthropic, DeepSeek, OpenRouter
| (?P<JSON_WEB_TOKEN>eyJ<b>{10,}\.eyJ<b>{10,}\.<b>{10,})
| (?P<HUGGING_FACE_TOKEN>(?:hf|api_org)_<w>{30,40})
| (?P<GITLAB_TOKEN>gl(?:pat|ptt|dt|rt|cbt|ft|soat|agent|imt|oas|ffct)-<b>{20,70}(?:\.[0-9a-z.]{9,20})?)
| (?P<NPM_TOKEN>npm_<w>{36})
| (?P<PYPI_TOKEN>pypi-AgE<b>{50,1000})
| (?P<STRIPE_KEY>(?:[sr]k|rzp)_(?:live|test|prod)_<w>{10,250}|whsec_[A-Za-z0-9+/=]{24,80})
| (?P<SENDGRID_KEY>SG\.<b>{16,32}\.<b>{32,64})
| (?P<TWILIO_KEY>(?:SK|AC)<h>{32})
| (?P<TELEGRAM_TOKEN>(?:bot)?[0-9]{7,12}:A<b>{34})
| (?P<DISCORD_TOKEN>[MNO]<w>{22,27}\.<b>{6}\.<b>{27,40})
| (?P<MAILGUN_KEY>(?:pub)?key-[0-9a-z]{32})
| (?P<MAILCHIMP_KEY><h>{32}-us[0-9]{1,2})
| (?P<DIGITALOCEAN_TOKEN>do[opr]_v1_<h>{64})
| (?P<ALIBABA_ACCESS_KEY>LTAI<w>{12,24})
| (?P<TENCENT_ACCESS_KEY>AKID<w>{32})
| (?P<AZURE_SECRET>[A-Za-z0-9_~.]{3}[0-9]Q~[A-Za-z0-9_~.-]{31,34})
| (?P<TOKEN>
    gsk_<w>{52}|xai-<w>{60,90}|pplx-<w>{40,60}|r8_<w>{37}      # Groq, xAI, Perplexity, Replicate
  | <h>{32}\.<w>{16}                                          # Zhipu
  | dapi<h>{32}|shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}            # Databricks, Shopify
  | sq0(?:atp|csp|idp)-<b>{22,60}|EAAA<b>{40,80}              # Square
  | lin_api_<w>{40}|ntn_<w>{40,50}|PMAK-<h>{24}-<h>{34}       # Linear, Notion, Postman
  | gl(?:sa|c)_[A-Za-z0-9_+/=]{32,200}|hv[sb]\.<b>{80,300}    # Grafana, Vault
  | dp\.(?:pt|st|ct)\.<b>{40,60}|pul-<h>{40}|NRAK-[A-Z0-9]{27}  # Doppler, Pulumi, New Relic
  | ATATT3[A-Za-z0-9_=-]{60,200}|ATBB<w>{32}                  # Atlassian, Bitbucket
  | pat<w>{14}\.<h>{64}|figd_<b>{40}|sntry[su]_[A-Za-z0-9+/=_-]{60,300}  # Airtable, Figma, Sentry
  | sbp_<h>{40}|pscale_(?:tkn|oauth|pw)_<b>{32,64}            # Supabase, PlanetScale
  | rubygems_<h>{48}|CLOJARS_[a-z0-9]{60}|dckr_pat_<b>{27}    # RubyGems, Clojars, Docker
  | AGE-SECRET-KEY-1[0-9A-Z]{58}|A3-[A-Z0-9]{6}-[A-Z0-9-]{25,35}|ops_eyJ[A-Za-z0-9+/=]{100,}  # age, 1Password
  | xkeysib-<h>{64}-<w>{16}|EZ[AT]K<w>{54}|duffel_(?:test|live)_<b>{43}  # Brevo, EasyPost, Duffel
  | fo1_<b>{43}|fm[12][ar]?_[A-Za-z0-9+/=]{100,}|dt0c01\.[A-Z0-9]{24}\.[A-Z0-9]{64}  # Fly, Dynatrace
  | sl\.<b>{100,200}|FLWSECK(?:_TEST)?-<h>{32}-X              # Dropbox, Flutterwave
  | EAA<w>{90,300}|AAAA<b>{7}:APA91b<b>{130,160}              # Facebook, Firebase
  | A{20,24}[A-Za-z0-9%]{60,120}|access_token\$production\$[0-9a-z]{16}\$<h>{32}  # Twitter, Braintree
  | sq[apu]_<h>{40}|nfp_<w>{36}|CFPAT-<b>{43}|HRKU-AA<b>{56,60}  # SonarQube, Netlify, Contentful, Heroku
  | <w>{14}\.atlasv1\.<b>{60,70}|tskey-[a-z]+-[A-Za-z0-9-]{20,60}  # Terraform, Tailscale
  | sgp_(?:<h>{16}_)?<h>{40}|nvapi-<b>{60,70}|lsv2_(?:pt|sk)_<h>{32}_<h>{10}  # Sourcegraph, NVIDIA, LangSmith
  | jina_<w>{60}|tvly-(?:dev-)?<w>{32}|ph[cx]_<w>{43}         # Jina, Tavily, PostHog
  | ABSK[A-Za-z0-9+/]{100,140}=*|AKCp<w>{69}|oy2[a-z0-9]{43}  # Bedrock, JFrog, NuGet
  | sha256~<b>{43}|SWMTKN-1-[0-9a-z]{50}-[0-9a-z]{25}|dckr_oat_<b>{32}  # OpenShift, Docker
  | 1//0<b>{40,200}|secret_<w>{43}                            # Google's token to refresh others, Notion
  )
)(?![A-Za-z0-9])
"""
_KEYS = re.compile(
    _FORMS.replace("<w>", "[A-Za-z0-9]").replace("<b>", "[A-Za-z0-9_-]").replace("<h>", "[0-9a-f]"),
    re.VERBOSE,
)
_NEED_CHANCE = ("API_KEY", "MAILGUN_KEY")
"""Forms that names made of words have too: `sk-cube-grid-spinner`, `key-`."""
# The secret part of an address that lets anyone post to a chat.
_WEBHOOK = re.compile(
    r"(?:hooks\.slack\.com/(?:services|workflows|triggers)/|discord(?:app)?\.com/api/webhooks/|/bot/v2/hook/"
    r"|webhook\.office\.com/webhookb2/|weixin\.qq\.com/cgi-bin/webhook/send\?key=)([A-Za-z0-9_@/-]{20,250})"
)
# Nearly every key has a digit between letters and another near it, unlike prose and names such as `LoadInt64Aligned`.
# The literals begin keys that are short or may have no digit.
_SIGN = re.compile(r"[0-9](?<=[A-Za-z].)[0-9]*[A-Za-z](?=[A-Za-z_.:/+-]{0,30}+[0-9])")
_BEARER = re.compile(r"[Bb]earer[ \t]{1,2}([A-Za-z0-9._~+/=-]{20,250})")
_KEY_CHARS = re.compile(r"[A-Za-z0-9_.+/=-]{0,400}")
_SIGN_LITERALS = ("AKIA", "ASIA", "AKID", "AIza", "LTAI", "glpat-", "hf_", "xox", "_live_", "_test_", ":AA")

_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,24}PRIVATE KEY(?: BLOCK)?-----"
    r"(?:((?:(?!-----).){1,20000})-----END [A-Z0-9 ]{0,24}PRIVATE KEY(?: BLOCK)?-----|((?:\s*[A-Za-z0-9+/=]{32,80})+))",
    re.DOTALL,
)


def find_secrets(text: str) -> Iterator[PiiMatch]:
    """Private keys, keys and tokens of known forms, and what is assigned to the name of a secret."""
    if "PRIVATE KEY" in text:
        for match in _PRIVATE_KEY.finditer(text):
            group = 1 if match[1] else 2
            if re.search(r"[A-Za-z0-9+/=]{40}", match[group]):
                yield PiiMatch(*match.span(group), "secret", "\nYOUR_PRIVATE_KEY\n", "")
    for start, end in spans_around(_signs(text), 80, 96):
        end = _KEY_CHARS.match(text, min(len(text), end)).end()
        for match in _KEYS.finditer(text, start, end):
            form = str(match.lastgroup)
            if _is_key(match[0]) and (form not in _NEED_CHANCE or _has_short_pieces(match[0])):
                yield PiiMatch(*match.span(), "secret", f"YOUR_{form}", "")
        for match in _BEARER.finditer(text, start, end):
            if _is_random(match[1]):
                yield PiiMatch(*match.span(1), "secret", "YOUR_TOKEN", "")
        for match in _WEBHOOK.finditer(text, start, end):
            if _is_key(match[1]):
                yield PiiMatch(*match.span(1), "secret", "YOUR_WEBHOOK", "")
    yield from _find_assigned(text)


def _signs(text: str) -> list[int]:
    signs = [match.start() for match in _SIGN.finditer(text)]
    for literal in _SIGN_LITERALS:
        if literal in text:
            signs += places(text, literal)
    return sorted(signs)


# --- by name ---

# The first lookahead leaves out most of what is assigned: what has no digit. The value is looked at, not consumed,
# since an address before it has an = or a : too.
_ASSIGNED = re.compile(
    r"[=:：](?=[^\n0-9]{0,60}+[0-9])"
    r"(?=>?\s{0,3}[bru]?([\"'`])(?:Bearer |Basic |token |ApiKey )?([^\s\"'`]{6,2000}+)\1"
    r"|[ \t]{0,3}(?:Bearer |Basic |token |ApiKey )?([A-Za-z0-9+/_=.~!@#$%^&*?|-]{6,2000}+)(?:[\s\"'`;,)<，。；]|\Z))"
)
_NAME_BEFORE = re.compile(
    r"(?:(?P<key>(?:api|access|account|private|auth|encryption|signing|admin|service|server|client|master|app|session"
    r"|shared|storage|bot|deploy|consumer|license)_?-?key|(?-i:[A-Z][A-Z0-9_]{1,30}_KEY)|secret|token|credential"
    r"|authorization"
    r"|\b_?auth(?=[\"'`\]]{0,2}\s{0,3}\Z)|密钥|秘钥|令牌)"
    r"|(?P<password>passw(?:or)?d|passphrase|passcode|\bpwd|_pwd|\bpass\b|_pass\b|\bpsk\b|\bpw\b|密码|密碼|口令))"
    r"[A-Za-z0-9_-]{0,16}[\"'`\]]{0,2}(?:\s?\([^()\n]{0,16}\))?\s{0,3}\Z",
    re.IGNORECASE,
)
_NAME_WORDS = ("key", "token", "secret", "pass", "pwd", "psk", "pw", "auth", "credential", "密", "钥", "令")
_NO_SECRET_NAME = re.compile(
    r"sha[0-9_-]|md5|hash|digest|checksum|tokeniz|tokens|encryption(?!_?-?key)|url|uri|path|file|type|algorithm|scope"
    r"|endpoint|policy|length|expire|public|cache|primary|foreign|sort_|partition",
    re.IGNORECASE,
)
_IN_URL = re.compile(r"://[^\s/:@\"'<>]{0,64}:([^\s/@\"'<>]{3,80})@(?=[A-Za-z0-9])")
# `my password is X`, `the password was changed to X`, `password X`, 密码是X.
_SAID = re.compile(
    r"[Pp]ass(?:word|code|phrase)(?: (?:for|of|to) [^\n.,:]{1,40}?)?(?: is| was|'s| has been)?(?: now| still)?"
    r"(?: (?:re)?set| changed)?(?: to|:|(?<= is)"
    r"|(?<= was)|(?<='s)|(?<= now)|(?<= still))[ \t]{1,2}[\"'`]?([^\s\"'`]{6,64}?)(?=[\"'`.,;!]?(?:\s|\Z))"
    r"|(?:密码|密碼|口令)(?:是|为|為)?[ \t]?([!-9;-~][!-~]{5,63})"
)
# A line of ~/.netrc, and the signature of a shared address of Azure.
_BY_PLACE = re.compile(
    r"(?:^|[ \t])password[ \t]+(\S{6,200})[ \t]*$|[?&]sig=([A-Za-z0-9+/%]{43,60}={0,2})(?![A-Za-z0-9+/%])",
    re.MULTILINE,
)
# Assigned without a digit near, which the quick search above passes over.
_LETTERS_ASSIGNED = re.compile(
    r"(?i:passw(?:or)?d|passphrase)[\"']?[ \t]?[:=][ \t]?[\"']?([A-Za-z]{10,64})(?![\w.(\[-])"
)
# Given to a command: `--password X`, `sshpass -p X`, `-u NAME:X`.
_OPTION = re.compile(
    r"(?:--(?:[a-z]+-){0,2}(?:password|passwd|passphrase|token|secret|api-key|access-key)[ =]|sshpass -p ?"
    r"|(?:mysql|mysqldump|mariadb)\b[^\n]{0,80}? -p|login\b[^\n]{0,80}? -p[ ]?|redis-cli\b[^\n]{0,80}? -a "
    r"|(?:curl|wget|http)[^\n]{0,120}? (?:-u|--user)[ =][\"']?[^\s:\"'/@]{1,40}:)[\"']?([^\s\"'`;|&<>]{6,200})"
)


def _find_assigned(text: str) -> Iterator[PiiMatch]:
    for match in _ASSIGNED.finditer(text):
        before = text[max(0, match.start() - 56) : match.start()]
        if not any(word in before.lower() for word in _NAME_WORDS):  # ten times as fast as the pattern
            continue
        name = _NAME_BEFORE.search(before)
        if name and not _NO_SECRET_NAME.search(name[0]):
            group = 2 if match[2] else 3
            value = match[group]
            if (
                _is_password(value, bool(match[1]))
                if name["password"]
                else _is_random(value)
                or _is_hexadecimal(value)
                or _is_login(value)
                or (match[1] and _is_generated(value))
            ):
                yield PiiMatch(*match.span(group), "secret", "YOUR_SECRET", "")
    if "://" in text:
        for match in _IN_URL.finditer(text):
            if _is_password(match[1], is_quoted=True):
                yield PiiMatch(*match.span(1), "secret", "YOUR_SECRET", "")
    yield from _find_said(text)
    yield from _find_in_markup(text)


# <password>X</password>, <add key="ApiSecret" value="X"/>; token是X and 密钥为X are assigned too.
_MARKUP = re.compile(
    r"<(?:\w+:)?\w{0,30}(?:(?P<password>password|passwd|pwd)|secret|token|api[_-]?key|access[_-]?key)>"
    r"([^\s<>]{6,2000})</"
    r"|(?:key|name)=\"[\w.:-]{0,40}?(?:(?P<word>password|passwd|pwd)|secret|token|api_?key|accesskey)\""
    r"\s{1,4}value=\"([^\s\"]{6,2000})\""
    r"|name: ?[\"']?\w{0,40}(?P<named>pass|passwd|password|secret|token|key)[\"']?"
    r"\s{1,20}value: ?[\"']?([^\s\"']{6,2000})"
    r"|(?:token|密钥|密鑰|秘钥|令牌|secret|key)[ ]?(?:是|为|為)[ ]?([A-Za-z0-9+/_.=-]{16,200})",
    re.IGNORECASE,
)
_MARKUP_SIGN = re.compile(
    r"[nt](?:(?<=token)|(?<=secret))[ ]?[是为為]|[钥鑰牌y][是为為]"
    r"|(?i:pass|password|passwd|pwd|secret|token|key)(?:>|[\"']?\n[ \t]*value|\" )"
)


# Each form of the pattern needs one of these; they are found in lower case, and twenty times as fast as the signs.
_CLOSED_NAMES = ("word>", "wd>", "ecret>", "oken>", "key>")
_IS_AFTER_NAME = re.compile("[是为為](?<=[nNtTyY钥鑰牌 ].)")


def _may_have_markup(text: str) -> bool:
    """Whether some form of `_MARKUP` is not ruled out by a string that it needs."""
    lower = text.lower()
    return (
        ("</" in text and any(name in lower for name in _CLOSED_NAMES))
        or ('value="' in lower and ('name="' in lower or 'key="' in lower))
        or ("value:" in lower and "name:" in lower)
        or (not text.isascii() and _IS_AFTER_NAME.search(text) is not None)
    )


def _find_in_markup(text: str) -> Iterator[PiiMatch]:
    if "</" not in text and "value" not in text and text.isascii():
        return
    if not _may_have_markup(text) or not _MARKUP_SIGN.search(text):
        return
    for match in _MARKUP.finditer(text):
        group = next(group for group in (2, 4, 6, 7) if match[group])
        value = match[group]
        is_password = match["password"] or match["word"] or (match["named"] or "").lower().startswith("pass")
        if (
            _is_password(value, is_quoted=True)
            if is_password
            else _is_random(value) or _is_hexadecimal(value)
        ):
            yield PiiMatch(*match.span(group), "secret", "YOUR_SECRET", "")


def _find_said(text: str) -> Iterator[PiiMatch]:
    """Passwords in sentences and on command lines."""
    if "assword" in text or "PASSW" in text or (not text.isascii() and ("密码" in text or "口令" in text)):
        for match in _SAID.finditer(text):
            group = 1 if match[1] else 2
            if _is_password(match[group], is_quoted=False):
                yield PiiMatch(*match.span(group), "secret", "YOUR_SECRET", "")
        for match in _LETTERS_ASSIGNED.finditer(text):
            if _is_password(match[1], is_quoted=True):
                yield PiiMatch(*match.span(1), "secret", "YOUR_SECRET", "")
    if ("password " in text and "login " in text) or "sig=" in text:
        for match in _BY_PLACE.finditer(text):
            group = 1 if match[1] else 2
            if match[2] or _is_password(match[1], is_quoted=False) or _is_hexadecimal(match[1]):
                yield PiiMatch(*match.span(group), "secret", "YOUR_SECRET", "")
    if " --" in text or " -u " in text or " -p" in text or "redis-cli" in text or "sshpass " in text:
        for match in _OPTION.finditer(text):
            if _is_password(match[1], is_quoted=False) or _is_random(match[1]):
                yield PiiMatch(*match.span(1), "secret", "YOUR_SECRET", "")


_NOT_SECRET = re.compile(
    r"example|(?<![A-Za-z])your|xxxx|\*\*\*|placeholder|changeme|dummy|redacted|<|\.\.\.|1234567890|abcdefgh|%[0-9A-F]{2}",
    re.IGNORECASE,
)
_PIECES = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+")


def _entropy(value: str) -> float:
    counts = Counter(value)
    return -sum(n / len(value) * math.log2(n / len(value)) for n in counts.values())


def _is_key(value: str) -> bool:
    """Whether what has the form of a key is one and not an example."""
    body = re.sub(r"[-_.~:/]", "", value)
    return not _NOT_SECRET.search(re.sub("%2[BF]|%3D", "", value)) and _entropy(body) >= 3


def _has_short_pieces(value: str, longest: float = 3.6) -> bool:
    """Whether letters, capitals and digits change as often as chance makes them, unlike in `sk-cube-grid-spinner`."""
    pieces = _PIECES.findall(value)
    return len(pieces) > 2 and sum(map(len, pieces)) / len(pieces) < longest


def _is_random(value: str) -> bool:
    """Whether an assigned value is a key: one part of 12 characters or more mixes letters and digits like chance."""
    if len(value) < 16 or _NOT_SECRET.search(value):
        return False
    parts = re.split(r"[-_.~/+=]", value)
    longest = "".join(parts) if len(value) >= 32 and _entropy(value) >= 4.2 else max(parts, key=len)
    digits = sum(map(str.isdigit, longest))
    is_mixed = (
        len(longest) >= 12 and 1 + (len(longest) < 24) <= digits < len(longest) and _entropy(longest) >= 2.8
    )
    return is_mixed and _has_short_pieces(longest)


def _is_hexadecimal(value: str) -> bool:
    """Whether a value is a key in hexadecimal digits, whose letters and digits may come in long runs; or a UUID."""
    is_form = re.fullmatch(
        r"[0-9a-f]{32,128}|[0-9A-F]{32,128}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", value
    )
    return bool(is_form) and _entropy(value) >= 3 and not _NOT_SECRET.search(value)


def _is_generated(value: str) -> bool:
    """Whether a quoted value is a long mixture of letters, digits and signs, such as Django's secret key."""
    is_mixed = len(set(re.findall(r"[!@#$%^&*()+]", value))) > 1 and any(map(str.isdigit, value))
    return is_mixed and len(value) >= 32 and _entropy(value) >= 4 and "example" not in value.lower()


def _is_login(value: str) -> bool:
    """Whether a value is `name:password` in base64, as HTTP and the files of Docker and npm have it."""
    if len(value) < 12 or len(value) % 4 or not re.fullmatch(r"[A-Za-z0-9+/]+={0,2}", value):
        return False
    name, colon, password = base64.b64decode(value).partition(b":")
    return bool(colon) and name.isascii() and name.isalnum() and len(password) > 3


def _is_password(value: str, is_quoted: bool) -> bool:
    """Whether a value assigned to a password is one: it mixes kinds of characters and is no name or expression."""
    if (
        _NOT_SECRET.search(value)
        or re.search(r"[$%{}()\[\]]", value[:2] + value[-1:])
        or re.search(r"[()\[\]{}]", value)
    ):
        return False
    kinds = sum(bool(re.search(kind, value)) for kind in ("[a-z]", "[A-Z]", "[0-9]", r"[!@#$%^&*?+=~|]"))
    is_named = re.fullmatch(r"[A-Za-z]+[0-9]{0,3}(?:[-_.][A-Za-z0-9]{1,12})+", value)
    if is_named and not _has_short_pieces(value, longest=2.5):
        return False  # a name: scram-sha-256
    if value.isalpha() and len(value) >= 10 and not value.islower() and _has_short_pieces(value, longest=3):
        return True  # letters by chance
    if is_quoted:
        return kinds >= 2 and not re.fullmatch(r"[A-Za-z_.:/ -]+", value)
    if re.fullmatch(r"[A-Za-z_.]+[0-9]{0,2}[,;.]?", value) and not _has_short_pieces(value, longest=3):
        return False  # a name: password1
    return kinds >= 3 or (kinds == 2 and len(value) >= 8 and sum(map(str.isdigit, value)) >= 2)
