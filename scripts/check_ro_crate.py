"""Check release folders with CRS4's rocrate-validator, without a network: python scripts/check_ro_crate.py FOLDER...

The validator pins libraries that the engine has in newer versions, so it lives in an environment of its own:

    python3 -m venv rocrate-env && rocrate-env/bin/pip install roc-validator rocrate
    rocrate-env/bin/python scripts/check_ro_crate.py RELEASE

It would fetch the JSON-LD context from the web. The copy that the package `rocrate` ships is given to it instead; that is the
context of RO-Crate 1.3, which has the terms of 1.2.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def main(folders: list[str]) -> int:
    """Print every issue at the levels MUST and SHOULD; 0 when no folder has one at MUST."""
    import json

    import rocrate
    from rocrate_validator import models, services
    from rocrate_validator.utils.http import HttpRequester

    context = (Path(rocrate.__file__).parent / "data" / "ro-crate.jsonld").read_text(encoding="utf-8")

    def from_package(self: Any, url: str, **options: Any) -> Any:
        if not url.startswith("https://w3id.org/ro/crate/"):
            return SimpleNamespace(status_code=504, text="", content=b"", ok=False, headers={}, url=url)
        return SimpleNamespace(
            status_code=200, text=context, content=context.encode(), ok=True, url=url,
            headers={"Content-Type": "application/ld+json"},
            json=lambda: json.loads(context), raise_for_status=lambda: None,
        )  # fmt: skip

    HttpRequester.get = from_package  # type: ignore[method-assign]
    bad = 0
    for folder in folders:
        settings = services.ValidationSettings(
            rocrate_uri=folder,
            profile_identifier="ro-crate-1.2",
            requirement_severity=models.Severity.RECOMMENDED,
            offline=True,
        )
        result = services.validate(settings)
        for issue in result.get_issues():
            print(f"{folder}: {issue.severity.name}: {issue.message}")
        broken = sum(issue.severity == models.Severity.REQUIRED for issue in result.get_issues())
        print(f"{folder}: {'NOT valid' if broken else 'valid'}, {broken} of {len(result.get_issues())} issues at MUST")
        bad += broken
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
