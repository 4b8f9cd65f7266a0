"""Plain data as YAML that `manifest_yaml` reads as it was.

The library writes by the rules of YAML 1.1: it leaves texts bare that are numbers in YAML 1.2.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from sandbox.model.manifest_yaml import plain_scalar

_WIDTH = 100
_LINE_ENDS = re.compile("[\r\x85\u2028\u2029]")
"""What a YAML reader takes for the end of a line, and gives back as another one."""


class _Dumper(yaml.SafeDumper):
    """Indents lists below their key, and writes texts of several lines as blocks."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = '"' if _LINE_ENDS.search(text) or plain_scalar(text) != text else "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def write_yaml(data: dict[str, Any]) -> str:
    """The text of a document, in the order of the data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=_WIDTH)
