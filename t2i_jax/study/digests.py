"""Names of what is computed: equal where everything that decides a result is equal."""

from collections.abc import Mapping
import hashlib
import json
from typing import Any


def digest(values: Mapping[str, Any]) -> str:
    """16 hex digits of numbers, strings and tuples by name."""
    text = json.dumps(dict(values), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
