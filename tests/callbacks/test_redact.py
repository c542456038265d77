import json

import pytest

from priorguide.callbacks.redact import HIDDEN, redact

KEY = "0123456789abcdef" * 2 + "01234567"  # 40 digits, as W&B's keys have


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("api_key", "anything"),
        ("WANDB_API_KEY", "anything"),
        ("hfToken", "anything"),
        ("db-password", 1234),
        ("credentials", {"user": "me", "pin": "12"}),
        ("auth", ["me", "12"]),
    ],
)
def test_redact_knows_secrets_by_their_key(name, value):
    assert redact({"data": [{name: value}]}) == {"data": [{name: HIDDEN}]}


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"hf_{'Ab1' * 11}", HIDDEN),
        (KEY, HIDDEN),
        (f"key {KEY}.", f"key {HIDDEN}."),
        ("s3://me:pass@host/bucket", f"s3://{HIDDEN}@host/bucket"),
        ("https://h/x.tar?X-Amz-Signature=ab12&part=2", f"https://h/x.tar?X-Amz-Signature={HIDDEN}&part=2"),
        ("--token=abc --rank=8", f"--token={HIDDEN} --rank=8"),
        ("Authorization: Bearer abcdefgh.ij", f"Authorization: Bearer {HIDDEN}"),
        ("AKIAABCDEFGHIJKLMNOP", HIDDEN),
        ("ghp_" + "a1" * 18, HIDDEN),
    ],
)
def test_redact_knows_secrets_by_their_form(text, left):
    assert redact({"note": text, "list": (text,)}) == {"note": left, "list": (left,)}


def test_redact_knows_the_secrets_of_the_environment(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "correct-horse")
    assert redact({"note": "say correct-horse"}) == {"note": f"say {HIDDEN}"}
    monkeypatch.delenv("MY_SERVICE_TOKEN")
    assert redact({"note": "say correct-horse"}) == {"note": "say correct-horse"}


def test_redact_keeps_everything_else():
    config = {
        "revision": KEY,
        "max_tokens": 77,
        "tokenizer": "openai/clip",
        "token_dropout": 0.1,
        "use_auth": True,
        "api_key": None,
        "path": "hf://datasets/someone/pictures",
        "url": "https://example.org/a@b?page=2",
        "lr_multipliers": {"class_embedding": 10},
        "betas": (0.9, 0.999),
        "keyframes": "key",
    }
    copy = json.loads(json.dumps(config))
    assert redact(config) == config
    assert json.loads(json.dumps(config)) == copy
