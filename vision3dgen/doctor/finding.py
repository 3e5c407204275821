"""What a check found: a verdict, a sentence, and what to do about it."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.markup import escape

from vision3dgen.files import atomic_write

Verdict = Literal["ok", "info", "warn", "fail"]
_STYLES = {"ok": "green", "info": "cyan", "warn": "yellow", "fail": "bold red"}


class Finding(NamedTuple):
    """One result of a check. `info` is reported without judgement; `values` are the numbers behind the message."""

    name: str
    verdict: Verdict
    message: str
    fix: str | None = None
    values: Mapping[str, Any] = {}


def is_sound(findings: Iterable[Finding]) -> bool:
    """Whether there is neither a warning nor a fault."""
    return all(finding.verdict in ("ok", "info") for finding in findings)


def print_findings(findings: Iterable[Finding], console: Console | None = None) -> None:
    """A line for each finding, its fix below it."""
    console = console or Console()
    for finding in findings:
        first, *rest = finding.message.splitlines()
        style = _STYLES[finding.verdict]
        console.print(
            f"[{style}]{finding.verdict:4}[/]  [bold]{escape(finding.name)}[/]: {escape(first)}", soft_wrap=True
        )
        for line in rest:
            console.print(f"      {escape(line)}", soft_wrap=True, highlight=False)
        if finding.fix:
            console.print(f"      fix: {escape(finding.fix)}", soft_wrap=True, highlight=False)


def write_findings(findings: Iterable[Finding], path: str | os.PathLike[str]) -> None:
    """Write findings as a JSON list; numbers that are not finite become null."""
    content = json.dumps([_finite(finding._asdict()) for finding in findings], indent=1, allow_nan=False)
    with atomic_write(path) as file:
        file.write(content.encode() + b"\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
