"""From bytes to a valid manifest, or to every mistake in them at once."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any, NoReturn

from sandbox.model import limits
from sandbox.model.manifest import Manifest
from sandbox.model.manifest_document import Document, Pairs, refuse, settle
from sandbox.model.manifest_json import read_json
from sandbox.model.manifest_rules import Breach, breaches
from sandbox.model.manifest_schema import validate, without_nulls
from sandbox.model.manifest_yaml import read_yaml
from sandbox.model.mistake import InvalidManifestError, Mark, Mistake

__all__ = ["InvalidManifestError", "Mistake", "parse_manifest", "read_document"]

OFFERED_PROFILES: Mapping[str, str] = {"agentic-dev": "", "basic": ""}
"""The profiles that come with Sandbox; nothing is in their way."""

_WRAPPERS = ("manifest", "manifest_yaml")


def parse_manifest(
    body: bytes,
    *,
    is_json: bool,
    profiles: Mapping[str, str] | None = OFFERED_PROFILES,
    clone_hosts: Collection[str] | None = None,
    priced: Callable[[str], bool] | None = None,
) -> Manifest:
    """The manifest in a request's body, with all defaults filled in.

    profiles: names with what is in the way of each, nothing where it can be used; None takes any name on trust.
    clone_hosts: the hosts that repositories may come from; None for any. priced: whether a model's price is known,
    which `budget_usd` needs; None takes it on trust.
    JSON may also be wrapped as `{"manifest": {…}}` or `{"manifest_yaml": "…"}`.
    Raises InvalidManifestError with all mistakes; a body that cannot be read at all has just one.
    """
    document = read_document(body, is_json=is_json)
    data = without_nulls(document.data)
    if type(data.get("version")) is int:
        data["version"] = str(data["version"])
    verdict = validate(data)
    found = [] if isinstance(verdict, Manifest) else verdict
    mistakes = [*document.mistakes, *_told(document, found, [*breaches(data, profiles, clone_hosts, priced)])]
    if mistakes or not isinstance(verdict, Manifest):
        _raise(mistakes)
    return verdict


def read_document(body: bytes, *, is_json: bool) -> Document:
    """The mapping in a request's body, unwrapped, with the places of everything, not held against the schema yet.

    Raises InvalidManifestError where it cannot be read; mistakes that leave the rest readable are in the document.
    """
    document = settle(_root(_text(body), is_json=is_json))
    if not isinstance(document.data, dict):
        refuse("must be a mapping with version, kind, metadata, repository and claude", rule="type")
    return document


def _text(body: bytes) -> str:
    if len(body) > limits.BODY_BYTES_MAX:
        refuse(f"must be at most {limits.BODY_BYTES_MAX // 1024} KiB", rule="range")
    body = body.removeprefix(BOM_UTF8)
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        refuse("must be UTF-8 text", mark=_mark_of_byte(body, error.start))
    if text.startswith("\ufeff"):
        refuse("must begin with one byte order mark at most; save it as plain UTF-8", mark=Mark(1, 1))
    if "\x00" in text:
        refuse("must not contain NUL characters", mark=_mark_of_byte(body, body.index(0)))
    if not text.strip():
        refuse("is empty", rule="required")
    return text


def _mark_of_byte(body: bytes, index: int) -> Mark:
    before = body[:index]
    return Mark(before.count(b"\n") + 1, index - before.rfind(b"\n"))


def _root(text: str, *, is_json: bool) -> Any:
    root = _read(text, is_json=is_json)
    if not isinstance(root, Pairs) or len(root) != 1 or root[0].key not in _WRAPPERS:
        return root
    wrapped = root[0]
    if wrapped.key == "manifest":
        return wrapped.value
    if not isinstance(wrapped.value, str):
        refuse("must have the text of a manifest in manifest_yaml", rule="type")
    # Through bytes again, for the same checks; half a character is refused there.
    return read_yaml(_text(wrapped.value.encode(errors="surrogatepass")))


def _read(text: str, *, is_json: bool) -> Any:
    if is_json:
        return read_json(text)
    if text.lstrip().startswith("{"):
        # JSON sent without its content type; YAML does not know all of its escapes.
        with suppress(InvalidManifestError):
            return read_json(text)
    return read_yaml(text)


def _told(document: Document, found: list[Breach], broken: list[Breach]) -> list[Mistake]:
    """With their places; what the document itself refused is told already."""
    kept = [breach for breach in found if breach.path not in document.refused]
    return [_mistake(document, breach) for breach in [*kept, *broken]]


def _mistake(document: Document, breach: Breach) -> Mistake:
    by_key = breach.rule == "unknown_field"
    mark = document.mark_of_key(breach.path) if by_key else document.mark_of_value(breach.path)
    return Mistake.at(breach.path, breach.rule, breach.message, mark)


def _raise(mistakes: list[Mistake]) -> NoReturn:
    ordered = sorted(mistakes, key=lambda mistake: (mistake.line or 0, mistake.column or 0))
    told = ordered[: limits.MANIFEST_MISTAKES_MAX]
    raise InvalidManifestError(told, left_out=len(ordered) - len(told))
