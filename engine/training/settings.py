"""`--set a.b=c`: the one way to change a value of a config other than editing it."""

from __future__ import annotations

from typing import Any

import yaml

from engine.errors import UsageError


def apply_overrides(values: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """Return `values` with each "a.b=c" applied; c is read as YAML.

    Raises:
        UsageError: an override has no "=" or passes through a value that is no mapping.
    """
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise UsageError("an override of the form a.b=value", override, "--set")
        keys = path.strip().split(".")
        values = {**values}
        here = values
        for key in keys[:-1]:
            inner = {} if here.get(key) is None else here[key]  # a section that a resolved config has as null
            if not isinstance(inner, dict):
                raise UsageError(f"a section at '{key}'", f"a single value, in '{override}'", "--set")
            here[key] = {**inner}
            here = here[key]
        here[keys[-1]] = yaml.safe_load(text)
    return values
