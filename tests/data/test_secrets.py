from __future__ import annotations

import pytest

from data.remote import shown
from data.secrets import redacted, redacted_tree

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"http://me:{SECRET}@host:5000/x", "http://***@host:5000/x"),
        (f"postgresql+psycopg2://me:{SECRET}@db/mlflow", "postgresql+psycopg2://***@db/mlflow"),
        (f"https://{SECRET}@host/a.tar", "https://***@host/a.tar"),
        (f"https://s3/x.tar?X-Amz-Signature={SECRET}&b=1", "https://s3/x.tar?***"),
        (
            f"pipe:curl -H 'Authorization: Bearer {SECRET}' https://h/{{0..3}}.tar",
            "pipe:curl -H 'Authorization: Bearer ***' https://h/{0..3}.tar",
        ),
        (f"pipe:AWS_SECRET_ACCESS_KEY={SECRET} s5cmd cat s3://b/a.tar",
         "pipe:AWS_SECRET_ACCESS_KEY=*** s5cmd cat s3://b/a.tar"),
        (f"pipe:fetch --api-key {SECRET} a.tar", "pipe:fetch --api-key *** a.tar"),
        (f'{{"password": "{SECRET}"}}', '{"password": "***"}'),
    ],
)  # fmt: skip
def test_secrets_are_hidden_and_nothing_else(text: str, expected: str) -> None:
    assert redacted(text) == expected
    assert SECRET not in shown(text)


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:///mlflow.db", "shards/train-{000000..000003}.tar", "OPENAI_API_KEY",
        "<user> tell me a secret word : {input}", "http://localhost:5000", "a@b",
        "https://host/train-000001.tar",
    ],
)  # fmt: skip
def test_what_is_none_stays(text: str) -> None:
    assert redacted(text) == text
    assert redacted_tree({"a": [text, 1, None]}) == {"a": [text, 1, None]}
