"""Secrets in addresses and commands, kept out of messages, trackers and checkpoints."""

import re
from typing import Any

_HIDDEN = r"\g<keep>***"
_NAMED = (
    r"(?:authorization|tokens?|secret|password|passwd|signature|credentials?"
    r"|api[-_]?key|access[-_]?key)"
)
_PATTERNS = (
    # user:password and token in front of a URL's host, and all that its query says
    (re.compile(r"(?P<keep>\b[a-z][a-z0-9+.-]*://)[^\s/@'\"]+(?=@)", re.I), _HIDDEN),
    (re.compile(r"(?P<keep>\bhttps?://[^\s?'\"]+\?)[^\s'\"]+", re.I), _HIDDEN),
    # Authorization: Bearer x, "password": "x", AWS_SECRET_ACCESS_KEY=x, --api-key x
    (
        re.compile(
            rf"(?P<keep>{_NAMED}['\"]?\s*[:=]\s*['\"]?(?:bearer |basic )?|--{_NAMED}\s+)"
            r"[^\s'\",;&|]+",
            re.I,
        ),
        _HIDDEN,
    ),
)


def redacted(text: str) -> str:
    """The text without what looks like a secret: logins and queries of URLs, tokens, passwords."""
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def redacted_tree(tree: Any) -> Any:
    """A JSON-like tree with all of its strings redacted."""
    if isinstance(tree, dict):
        return {key: redacted_tree(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [redacted_tree(value) for value in tree]
    return redacted(tree) if isinstance(tree, str) else tree
