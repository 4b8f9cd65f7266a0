"""Validates API objects against the published OpenAPI definitions of Kubernetes.

`definitions.json` contains the definitions that the tests need, with their licence notice. Unknown fields are errors,
as for an API server with `fieldValidation=Strict`.
"""

import json
import re
from functools import cache
from pathlib import Path

import jsonschema

_META = "io.k8s.apimachinery.pkg.apis.meta.v1"
DEFINITIONS = {
    "Status": f"{_META}.Status",
    "Job": "io.k8s.api.batch.v1.Job",
    "JobList": "io.k8s.api.batch.v1.JobList",
    "TokenReview": "io.k8s.api.authentication.v1.TokenReview",
    "SelfSubjectAccessReview": "io.k8s.api.authorization.v1.SelfSubjectAccessReview",
    "StatefulSet": "io.k8s.api.apps.v1.StatefulSet",
    **{kind: f"io.k8s.api.core.v1.{kind}" for kind in ("Pod", "PodList", "NodeList", "Namespace", "ServiceAccount")},
    "Service": "io.k8s.api.core.v1.Service",
    **{kind: f"io.k8s.api.rbac.v1.{kind}" for kind in ("Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding")},
}
_QUANTITY = re.compile(r"\d+(\.\d+)?([KMGTPE]i|[numkMGTPE]|[eE][+-]?\d+)?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")
_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")


@cache
def _definitions():
    definitions = json.loads((Path(__file__).parent / "definitions.json").read_text())["$defs"]
    for definition in definitions.values():
        if "properties" in definition:
            definition["additionalProperties"] = False
    return definitions


@cache
def _validator(kind):
    schema = {"$ref": f"#/$defs/{DEFINITIONS[kind]}", "$defs": _definitions()}
    return jsonschema.Draft202012Validator(schema)


def validate(value):
    """Check an object against the definition of its kind. Raises AssertionError."""
    errors = [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message[:300]}"
        for error in _validator(value["kind"]).iter_errors(value)
    ]
    assert errors == [], errors
    for labels in _find(value, "labels"):
        assert all(_LABEL_VALUE.fullmatch(each) for each in labels.values()), labels


def validate_job(job):
    """Check what the API server checks of a new Job in addition to its schema. Raises AssertionError."""
    validate(job)
    template = job["spec"]["template"]["spec"]
    assert _NAME.fullmatch(job["metadata"]["name"])
    assert template["restartPolicy"] in {"Never", "OnFailure"}
    assert 1 <= template["activeDeadlineSeconds"] < 2**31
    volumes = {volume["name"] for volume in template["volumes"]}
    for container in template["containers"]:
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        for kind in ("requests", "limits"):
            assert all(_QUANTITY.fullmatch(each) for each in container["resources"][kind].values())
        assert all(re.fullmatch(r"[-._a-zA-Z][-._a-zA-Z0-9]*", each["name"]) for each in container["env"])
    for fields in _find(template, "matchFields"):
        for field in fields:
            assert field["key"] == "metadata.name"
            assert field["operator"] in {"In", "NotIn"}
            assert len(field["values"]) == 1
            assert _NAME.fullmatch(field["values"][0])


def _find(value, key):
    """Yield the values of a key at any depth."""
    if isinstance(value, dict):
        if key in value:
            yield value[key]
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _find(each, key)
