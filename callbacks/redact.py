"""Configs without their secrets, before they leave the machine."""

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "[redacted]"
SECRET_KEY = re.compile(
    r"(?:^|_)(?:(?:api|access|private|secret|account|signing|encryption)_?keys?|tokens?|passwords?|passwd|passphrase"
    r"|secrets?|credentials?|auth|authorization)$"
)
"""What the name of a secret ends in: hf_token, but not token_count."""
SECRET_VALUE = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|wandb_v\d_\w{16,}"
    r"|(?:sk|rk|pk)-[\w-]{16,}"  # OpenAI and its kin
    r"|gh[opsur]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}"  # AWS
    r"|xox[a-z]-[\w-]{10,}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,})"  # JSON web tokens
)
HEX_KEY = re.compile(r"\b[0-9a-fA-F]{40}\b")
"""A W&B key; also what a commit looks like, which REVISION names may hold."""
REVISION = re.compile(r"(?:revision|commit|sha|sha1)$")
BEFORE_SECRET = (
    re.compile(r"([a-z][a-z0-9+.-]*://)[^/\s@]+(?=@)", re.I),  # user:password@ in an address
    re.compile(r"([?&;][\w.-]*(?:key|token|secret|password|signature|sig|credential)=)[^&;\s#]+", re.I),
    re.compile(r"(\b(?:bearer|basic)\s+)[\w.~+/=-]{8,}", re.I),
    re.compile(r"((?:api[_-]?key|token|password|secret)\s*[=:]\s*)[^\s,;&\[]+", re.I),
)


def redact(config: Any) -> Any:
    """A copy of nested dicts and lists with HIDDEN in place of secrets; everything else is kept as it is.

    A secret is known by its key (api_key, hf_token, password, ...), by its form (keys of W&B, Hugging Face and others,
    user:password@ and signatures in addresses), or by being the value of such an environment variable.
    """
    known = {value for name, value in os.environ.items() if len(value) >= 8 and SECRET_KEY.search(_snake(name))}
    return _redact(config, "", sorted(known, key=len, reverse=True))


def _redact(value: Any, key: str, known: list[str]) -> Any:
    harmless = bool if not key.endswith(("token", "tokens")) else int  # use_auth: true, max_tokens: 77
    if SECRET_KEY.search(key) and not isinstance(value, harmless | None):
        return HIDDEN
    if isinstance(value, Mapping):
        return {name: _redact(item, _snake(str(name)), known) for name, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_redact(item, key, known) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    return _clean(value, key, known) if isinstance(value, str) else value


def _clean(text: str, key: str, known: list[str]) -> str:
    for secret in known:
        text = text.replace(secret, HIDDEN)
    for pattern in BEFORE_SECRET:
        text = pattern.sub(rf"\g<1>{HIDDEN}", text)
    text = SECRET_VALUE.sub(HIDDEN, text)
    return text if REVISION.search(key) else HEX_KEY.sub(HIDDEN, text)


def _snake(name: str) -> str:
    """apiKey, API_KEY and api-key as one."""
    parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return parts.lower().replace("-", "_").replace(".", "_")
