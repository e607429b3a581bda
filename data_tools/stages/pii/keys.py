"""Finds private keys, and the keys and tokens of services by their form.

The forms are those of gitleaks' default rules (MIT, github.com/gitleaks/gitleaks, config/gitleaks.toml, July 2026) and
of detect-secrets' plugins (Apache-2.0, github.com/Yelp/detect-secrets, 1.5), and for services that neither knows, those
of the documentation of the service.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from data_tools.stages.pii.finding import PiiMatch, places, spans_around
from data_tools.stages.pii.values import has_short_pieces, is_key, is_random

# <w> is a letter or digit, <b> one of base64 for addresses, <h> a hexadecimal digit. The name of a group becomes the
# placeholder.
_FORMS = r"""
(?<![A-Za-z0-9_-])(?:
  (?P<AWS_ACCESS_KEY>(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16})
| (?P<GITHUB_TOKEN>gh[pousr]_<w>{36,251}|github_pat_[A-Za-z0-9_]{40,255})
| (?P<SLACK_TOKEN>xox[abeoprs]-[A-Za-z0-9-]{20,250}|xox[cd]-[A-Za-z0-9%-]{20,300}
    |xapp-[0-9]-[A-Za-z0-9-]{20,250}|xoxe\.xox[bp]-<b>{20,250})
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
| (?P<TELEGRAM_TOKEN>(?:bot)?[0-9]{7,12}:A<b>{32,36})
| (?P<DISCORD_TOKEN>[MNO]<w>{22,27}\.<b>{6}\.<b>{27,40})
| (?P<MAILGUN_KEY>(?:pub)?key-[0-9a-z]{32})
| (?P<MAILCHIMP_KEY><h>{32}-us[0-9]{1,2})
| (?P<DIGITALOCEAN_TOKEN>do[opr]_v1_<h>{64})
| (?P<ALIBABA_ACCESS_KEY>LTAI<w>{12,24})
| (?P<TENCENT_ACCESS_KEY>AKID<w>{32})
| (?P<AZURE_SECRET>[A-Za-z0-9_~.]{3}[0-9]Q~[A-Za-z0-9_~.-]{31,34})
| (?P<VAULT_TOKEN>[sbr]\.<w>{24})
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
  | aio_<w>{28}|da2-[a-z0-9]{26}|cio<w>{32}|live_[0-9]{6,12}_<w>{30}  # Adafruit, AppSync, crates.io, Twitch
  | dp\.(?:pt|st|ct|sa|scim|audit)\.(?:[a-z0-9_-]{2,35}\.)?<w>{40,44}  # Doppler
  | NR(?:AA|RA|JS|SP)-?[a-zA-Z0-9]{27}|NR(?:II|IQ)-<b>{32}    # New Relic
  | CCIPAT_<w>{22}_<h>{40}|re_<w>{8}_<w>{22,26}|rnd_<w>{28,34}  # CircleCI, Resend, Render
  | pcsk_<w>{4,8}_<w>{50,70}|tgp_v1_<b>{43}|fw_<w>{22,26}|csk-<w>{40,60}|rpa_<w>{40,50}  # Pinecone, Together, Fireworks
  | fc-<h>{32}|e2b_<h>{40}|sk_<h>{40,64}|pa-<b>{43}           # Firecrawl, E2B, ElevenLabs, Voyage
  | SEC<h>{64}|SCT[0-9]{3,7}T?<w>{20,34}|AKLT<b>{20,60}|ALTAK<w>{21}|JDC_[0-9A-Z]{28}  # Chinese services
  | ATCTT3<b>{60,300}=?|GOOG1[A-Z0-9]{19,60}|y[0-3]_<b>{50,70}|AQVN<b>{35,38}  # Bitbucket, GCS, Yandex
  | t1\.9eu<b>{40,300}\.<b>{86}
  | vk1\.a\.<b>{80,300}|v1\.0-<h>{24}-<h>{146}|sb_secret_<b>{30,50}|0x4AAAA<b>{24,40}  # VK, Cloudflare, Supabase
  | shp(?:pa|tka)_<h>{32}|[ao]ct_<b>{40,60}|lob_<w>{30,40}|(?:live|test)_(?:pub_)?<h>{31,35}  # Shopify, Lob
  | pypi-<b>{85,300}|gl(?:ptat|ffct|wt)-<b>{20,40}|sk-lf-<h>{8}(?:-<h>{4}){3}-<h>{12}  # PyPI, GitLab, Langfuse
  )
)(?![A-Za-z0-9])
"""
_KEYS = re.compile(
    _FORMS.replace("<w>", "[A-Za-z0-9]").replace("<b>", "[A-Za-z0-9_-]").replace("<h>", "[0-9a-f]"),
    re.VERBOSE,
)
_NEED_CHANCE = ("API_KEY", "MAILGUN_KEY", "VAULT_TOKEN", "HUGGING_FACE_TOKEN")
"""Forms that names made of words have too: `sk-cube-grid-spinner`, `key-`."""
# The secret part of an address that lets anyone post to a chat.
_WEBHOOK = re.compile(
    r"(?:hooks\.slack\.com/(?:services|workflows|triggers)/|discord(?:app)?\.com/api/webhooks/|/bot/v2/hook/"
    r"|webhook\.office\.com/webhookb2/|outlook\.office\.com/webhook/|weixin\.qq\.com/cgi-bin/webhook/send\?key="
    r"|maker\.ifttt\.com/[^\s\"']{1,60}/key/|sctapi\.ftqq\.com/|hooks\.zapier\.com/hooks/catch/[0-9]{4,10}/|api\.day\.app/"
    r"|events\.pagerduty\.com/integration/|/hooks/(?=[a-z0-9]{26}\b))([A-Za-z0-9_@/-]{7,250})"
)
# Nearly every key has a digit between letters and another near it, unlike prose and names such as `LoadInt64Aligned`.
# The literals begin keys that are short or may have no digit.
_SIGN = re.compile(r"[0-9](?<=[A-Za-z].)[0-9]*[A-Za-z](?=[A-Za-z_.:/+-]{0,30}+[0-9])")
_BEARER = re.compile(r"[Bb]earer[ \t]{1,2}([A-Za-z0-9._~+/=-]{20,250})")
_KEY_CHARS = re.compile(r"[A-Za-z0-9_.+/=-]{0,400}")
_SIGN_LITERALS = (
    *(
        "AKIA",
        "ASIA",
        "AKID",
        "AIza",
        "LTAI",
        "glpat-",
        "hf_",
        "xox",
        "_live_",
        "_test_",
        ":AA",
        "npm_",
        "ghp_",
        "SG.",
    ),
    *("hook", "sk-"),
)

# An encoded "-----BEGIN ... PRIVATE KEY", as Kubernetes keeps it, and the forms of PuTTY and SSH.com.
_ENCODED_KEY = re.compile(
    r"LS0tLS1CRUdJTi(?:BSU0EgUFJJVk|BQUklWQV|BFQyBQUk|BPUEVOU1NI|BFTkNSWVBURU|BEU0Eg)[A-Za-z0-9+/]{40,}+={0,2}"
    r"|Private-Lines: [0-9]{1,3}((?:\s{1,3}(?!YOUR_)[A-Za-z0-9+/=]{4,80}(?![A-Za-z0-9:-]))+)"
    r"|---- BEGIN SSH2 ENCRYPTED PRIVATE KEY ----\s(?:[A-Z][\w-]{1,40}: [^\n]{1,200}\n){0,4}"
    r"([A-Za-z0-9+/=\s]{40,20000})----"
)
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,24}PRIVATE KEY(?: BLOCK)?-----"
    r"(?:((?:(?!-----).){1,20000})-----END [A-Z0-9 ]{0,24}PRIVATE KEY(?: BLOCK)?-----|((?:\s*[A-Za-z0-9+/=]{32,80})+))",
    re.DOTALL,
)


def find_keys(text: str) -> Iterator[PiiMatch]:
    """Private keys, and keys and tokens of known forms."""
    if "PRIVATE KEY" in text:
        for match in _PRIVATE_KEY.finditer(text):
            group = 1 if match[1] else 2
            if re.search(r"[A-Za-z0-9+/=]{40}", match[group]):
                yield PiiMatch(*match.span(group), "secret", "\nYOUR_PRIVATE_KEY\n", "")
    if "LS0tLS1CRUdJTi" in text or "Private-Lines" in text or "BEGIN SSH2" in text:
        for match in _ENCODED_KEY.finditer(text):
            group = match.lastindex or 0
            yield PiiMatch(
                *match.span(group), "secret", "\nYOUR_PRIVATE_KEY\n" if group else "YOUR_PRIVATE_KEY", ""
            )
    for start, end in spans_around(_signs(text), 80, 96):
        end = _KEY_CHARS.match(text, min(len(text), end)).end()
        for match in _KEYS.finditer(text, start, end):
            form = str(match.lastgroup)
            if is_key(match[0]) and (form not in _NEED_CHANCE or has_short_pieces(match[0], longest=2.9)):
                yield PiiMatch(*match.span(), "secret", f"YOUR_{form}", "")
        for match in _BEARER.finditer(text, start, end):
            if is_random(match[1]):
                yield PiiMatch(*match.span(1), "secret", "YOUR_TOKEN", "")
        for match in _WEBHOOK.finditer(text, start, end):
            if any(map(str.isdigit, match[1])) or len(match[1]) > 20:
                yield PiiMatch(*match.span(1), "secret", "YOUR_WEBHOOK", "")


def _signs(text: str) -> list[int]:
    signs = [match.start() for match in _SIGN.finditer(text)]
    for literal in _SIGN_LITERALS:
        if literal in text:
            signs += places(text, literal)
    return sorted(signs)
