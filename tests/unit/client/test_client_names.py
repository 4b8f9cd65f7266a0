"""Public names of the client: events have the server's names; deprecated names can be imported, but emit a warning."""

import subprocess
import sys
from typing import get_args, is_typeddict

import pytest

import sandbox.client
from sandbox.client import ClientError, InvalidManifestError
from sandbox.model.wire import event_bodies

DEPRECATED_NAMES = {
    "AttemptBegun": "AttemptEvent",
    "EgressDenied": "EgressDeniedEvent",
    "End": "EndEvent",
    "Gap": "GapEvent",
    "Measured": "MetricsEvent",
    "Mistake": "FieldError",
    "Output": "OutputEvent",
    "ProgressMade": "ProgressEvent",
    "StateChange": "StateChangeEvent",
    "TooLargeError": "ArtifactTooLargeError",
    "ToolCall": "ToolCallEvent",
    "Trouble": "ErrorEvent",
    "UnexpectedAnswerError": "UnexpectedResponseError",
    "Usage": "UsageEvent",
}
"""Names that earlier versions exported."""


def test_every_event_is_exported_under_the_name_of_its_class():
    kinds = [kind for kind in get_args(event_bodies.Event) if is_typeddict(kind)]
    assert len(kinds) > 10
    for kind in (*kinds, event_bodies.BaseEvent):
        assert getattr(sandbox.client, kind.__name__) is kind
        assert kind.__name__ in sandbox.client.__all__


@pytest.mark.parametrize(("deprecated", "name"), DEPRECATED_NAMES.items())
def test_deprecated_name_refers_to_the_renamed_object_and_warns(deprecated, name):
    with pytest.warns(
        DeprecationWarning, match=rf"sandbox\.client\.{deprecated} is deprecated; use {name}\."
    ) as caught:
        assert getattr(sandbox.client, deprecated) is getattr(sandbox.client, name)
    assert caught[0].filename == __file__


def test_dunder_all_excludes_deprecated_names():
    assert sandbox.client.DEPRECATED_NAMES == DEPRECATED_NAMES
    assert not DEPRECATED_NAMES.keys() & set(sandbox.client.__all__)
    assert DEPRECATED_NAMES.keys().isdisjoint(vars(sandbox.client))


@pytest.mark.parametrize(("name", "warnings"), [("Trouble", 1), ("ErrorEvent", 0)])
def test_warning_about_a_deprecated_import_has_the_line_of_the_importing_program(tmp_path, name, warnings):
    program = tmp_path / "program.py"
    program.write_text(f"from sandbox.client import {name}\n")
    completed = subprocess.run(
        [sys.executable, "-W", "default", str(program)], capture_output=True, text=True, timeout=60, check=True
    )
    assert completed.stderr.count(f"{program}:1: DeprecationWarning") == warnings, completed.stderr
    assert completed.stderr.count("DeprecationWarning") == warnings


def test_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Sorrow'"):
        sandbox.client.Sorrow  # noqa: B018


def test_deprecated_properties_of_errors_warn():
    field_error = {"field": "vm.cpus", "rule": "range", "message": "must be …", "line": 4, "column": 9}
    invalid = InvalidManifestError("It is invalid.", body={"details": [field_error]})
    with pytest.warns(DeprecationWarning, match="use field_errors"):
        assert invalid.mistakes == invalid.field_errors == [field_error]
    error = ClientError("It failed.", body={"error": "x"})
    with pytest.warns(DeprecationWarning, match="use body"):
        assert error.told == error.body == {"error": "x"}
