"""No secret is told: by its shape, by what the environment calls it, or as a part of a URI."""

from __future__ import annotations

import contextlib
import io
import logging
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lemon.runtime.secrets import guarded, holds_secret, is_secret_name, redacted

SECRET = "pl4nted/S3CRET+key"


@pytest.mark.parametrize(
    "text",
    [
        f"s3://AKIA:{SECRET}@bucket/x",
        "s3://S3CRET@bucket",
        f"postgresql://me:{SECRET}@host:5432/db",
        f"https://b.s3.amazonaws.com/x?X-Amz-Credential=a&X-Amz-Signature={SECRET}&y=1",
        f"https://host/x?access_token={SECRET}",
        f"https://account.blob/x?sv=1&sig={SECRET}",
        f"AWS_SECRET_ACCESS_KEY={SECRET}",
        f"{{'Authorization': 'Bearer {SECRET}'}}",
        f"X-Auth-Token: {SECRET}",
        f'{{"password": "{SECRET}"}}',
    ],
)
def test_what_looks_like_a_secret_is_not_told(text: str) -> None:
    assert "S3CRET" not in redacted(text)


@pytest.mark.parametrize(
    "text",
    [
        "'verbose': expected key=value; --help lists the keys",
        "s3://bucket/user@example.org/slide 1.svs",
        "http://localhost:5000/a@b",
        "HF_TOKEN: not set; the hub refuses access",
        "output: /data/run=3/cells is being written by curate (host node7, process 12)",
        "sqlite:////data/mlflow.db",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        *((name, True) for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "PGPASSWORD", "MYSQL_PWD", "GDC_TOKEN")),
        *((name, True) for name in ("AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD", "WANDB_API_KEY")),
        *((name, False) for name in ("PWD", "OLDPWD", "HOME", "RAY_AUTH_TOKEN_PATH", "MONKEY", "HF_TOKEN_PATH")),
    ],
)
def test_variables_are_secret_by_their_name(name: str, secret: bool) -> None:
    assert is_secret_name(name) == secret


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=8, max_size=40), st.text(max_size=20))
def test_a_secret_of_the_environment_is_told_in_no_spelling(secret: str, around: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOME_TOKEN", secret)
        for spelled in (secret, repr(secret)[1:-1]):
            told = redacted(f"<<{spelled}>>")
            assert told in ("<<***>>", "<<***@>>")


def test_the_password_of_a_database_is_not_told_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:hunter2 x@host/db")
    assert redacted('authentication failed for "hunter2 x"') == 'authentication failed for "***"'
    assert "hunter2" not in redacted("cannot connect to postgresql://me:hunter2 x@host/db")


@pytest.mark.parametrize(
    ("uri", "secret"),
    [
        *((uri, True) for uri in ("s3://K:S@b/x", "s3://K:S/T@b/x", "s3://b/x?region=y", "http://u@h", "s3://b:key/x")),
        *((uri, False) for uri in ("s3://b/x", "s3://b/a@b/x", "s3://b/slide?.svs", "http://h:80/x", "/a:b@c", "x")),
    ],
)
def test_a_uri_that_holds_a_key_is_told_apart(uri: str, secret: bool) -> None:
    assert holds_secret(uri) == secret


def test_printing_logging_and_warning_are_redacted_and_so_is_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    log = logging.getLogger("lemon.test")
    with pytest.raises(RuntimeError) as caught, guarded():
        handler = logging.StreamHandler()
        log.addHandler(handler)
        print(SECRET, file=sys.stderr)
        print(f"value {SECRET}")
        log.warning("key %s", SECRET)
        log.removeHandler(handler)
        raise RuntimeError(SECRET)
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        sys.excepthook(caught.type, caught.value, caught.tb)
    everything = "".join(capsys.readouterr()) + told.getvalue()
    assert SECRET not in everything
    assert "RuntimeError: ***" in told.getvalue()
    assert "value ***" in everything
