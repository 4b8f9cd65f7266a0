"""Quantities and objects of Kubernetes' API."""

import msgspec
import pytest

from sandbox.cluster_engines.kubernetes.api import (
    AMOUNT_MAX,
    ApiNode,
    ApiPod,
    ContainerState,
    ObjectList,
    Status,
    TokenReview,
    parse_quantity,
)
from sandbox.model.resources import Resources


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("4", 4),
        ("3920m", 3),
        ("999m", 0),
        ("0.5", 0),
        ("1.5Gi", 1536 * 1024**2),
        (".5Ki", 512),
        ("5.", 5),
        ("32883128Ki", 32883128 * 1024),
        ("129M", 129_000_000),
        ("1e3", 1000),
        ("12E2", 1200),
        ("1E", 10**18),
        ("1Ei", 2**60),
        ("5000000000n", 5),
        ("0", 0),
        ("1e99", AMOUNT_MAX),
        ("9999999999999999999999999999999999999", AMOUNT_MAX),
    ],
)
def test_quantity_is_rounded_down_and_bounded(text, amount):
    assert parse_quantity(text) == amount


@pytest.mark.parametrize(
    "text", ["", ".", "-1", "+1", "1 Gi", "Gi", "1gi", "1e", "1e100", "1ee1", "0x10", "١", "1\n", "1" * 41]
)
def test_invalid_quantity_is_an_error(text):
    with pytest.raises(ValueError, match="not a quantity"):
        parse_quantity(text)


def test_node_without_a_resource_has_none_of_it():
    node = msgspec.json.decode(b'{"metadata": {"name": "n1", "uid": "u"}}', type=ApiNode)
    assert node.resources().cpus == 0


def test_fields_that_are_null_or_unknown_are_accepted():
    body = b"""{"items": [{"metadata": {"name": "p", "uid": "u", "managedFields": [{}]}, "spec": {"nodeName": "n1"},
        "status": {"conditions": null, "containerStatuses": null, "phase": "Pending"}}], "metadata": {}}"""
    page = msgspec.json.decode(body, type=ObjectList[ApiPod])
    assert page.items[0].worker_state.terminated is None
    assert page.items[0].status.find("Ready") is None
    assert page.metadata.continue_token == ""


def test_missing_fields_are_decoded_as_empty():
    review = msgspec.json.decode(b'{"status": {}}', type=TokenReview).status
    assert (review.authenticated, review.audiences) == (False, ())
    assert (review.user.username, review.user.extra) == ("", {})
    pod = msgspec.json.decode(b'{"metadata": {"name": "p", "uid": "u"}}', type=ApiPod)
    assert (pod.job, pod.spec.node_name, pod.worker_state) == ("", "", ContainerState())
    assert pod.metadata.labels == {}
    assert (pod.status.phase, pod.status.reason, pod.status.message) == ("", "", "")
    assert msgspec.json.decode(b"{}", type=Status) == Status("", "")


def test_page_names_the_next_page():
    body = b'{"items": [], "metadata": {"continue": "next"}}'
    assert msgspec.json.decode(body, type=ObjectList[ApiPod]).metadata.continue_token == "next"


@pytest.mark.parametrize(
    ("owner", "job"),
    [
        ({"kind": "Job", "name": "j", "controller": True}, "j"),
        ({"kind": "Job", "name": "j", "controller": False}, ""),
        ({"kind": "Job", "name": "j"}, ""),
        ({"kind": "ReplicaSet", "name": "j", "controller": True}, ""),
    ],
)
def test_job_of_a_pod_is_its_controller(owner, job):
    pod = msgspec.convert({"metadata": {"name": "p", "uid": "u", "ownerReferences": [owner]}}, ApiPod)
    assert pod.job == job


def test_node_has_its_allocatable_resources():
    allocatable = {"cpu": "3920m", "memory": "2Gi", "ephemeral-storage": "10G", "pods": "x"}
    meta = {"name": "n1", "uid": "u"}
    node = msgspec.convert({"metadata": meta, "status": {"allocatable": allocatable}}, ApiNode)
    assert node.resources() == Resources(3, 2**31, 10**10)
    assert (node.spec.unschedulable, node.spec.taints) == (False, None)


@pytest.mark.parametrize(("uid", "is_valid"), [("", False), ("u", True), ("u" * 128, True), ("u" * 129, False)])
def test_length_of_uids_is_limited(uid, is_valid):
    try:
        msgspec.convert({"metadata": {"name": "n", "uid": uid}}, ApiNode)
    except msgspec.ValidationError:
        assert not is_valid
    else:
        assert is_valid


def test_quantity_may_have_forty_characters():
    assert parse_quantity("0" * 39 + "7") == 7
    assert AMOUNT_MAX == 2**62
