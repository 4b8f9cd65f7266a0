"""Listing and download of artifacts."""

import hashlib

import pytest

from doubles.example_requests import PATCH_ARTIFACT, Example
from doubles.fake_tasks import START_TIME
from doubles.fake_token_store import FakeTokenStore
from sandbox.api.routes import artifacts
from sandbox.api.routes.artifacts import content_disposition
from sandbox.model.artifacts import Artifact

EXAMPLES = (
    Example("list_artifacts"),
    Example("download_artifact", path_params={"name": PATCH_ARTIFACT.name}),
)

DATA = bytes(range(256)) * 40
CHECKSUM = hashlib.sha256(DATA).hexdigest()
ARTIFACTS_PATH = "/api/v1/tasks/task-001/artifacts"


@pytest.fixture(autouse=True)
def add_artifact(tasks, tmp_path):
    """Return a function that adds artifacts. The artifact `report.bin` already exists."""
    tasks.add("task-001")

    def add(name, path=None, data=DATA, content_type="application/octet-stream", *, contains_secret=False):
        file = tmp_path / f"{len(tasks.entries['task-001'].artifacts)}"
        file.write_bytes(data)
        checksum = f"sha256:{hashlib.sha256(data).hexdigest()}"
        tasks.add_artifact(
            "task-001", Artifact(name, path or name, len(data), content_type, checksum, contains_secret), file
        )
        return file

    add("report.bin", "out/report.bin")
    return add


@pytest.mark.parametrize("headers", [{}, {"range": "bytes=0-3"}])
def test_artifact_that_is_deleted_before_it_is_opened_is_not_found(api, monkeypatch, tasks, headers):
    assert api.get(f"{ARTIFACTS_PATH}/report.bin", headers=headers).status_code == (206 if headers else 200)
    stat_file = artifacts._stat_regular_file

    def stat_and_delete(file):
        result = stat_file(file)
        file.unlink()
        return result

    monkeypatch.setattr(artifacts, "_stat_regular_file", stat_and_delete)
    response = api.get(f"{ARTIFACTS_PATH}/report.bin", headers=headers)
    assert (response.status_code, response.json()["error"]) == (404, "artifact_not_found")
    assert "x-checksum-sha256" not in response.headers


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("headers", [{}, {"range": "bytes=0-3"}, {"if-none-match": "*"}])
@pytest.mark.parametrize("reference", ["leaky.bin", "out%2Fleaky.bin"])
def test_artifact_with_a_secret_is_available_to_operators_only(
    api_with_tokens, add_artifact, method, headers, reference
):
    add_artifact("leaky.bin", "out/leaky.bin", contains_secret=True)
    api = api_with_tokens(FakeTokenStore(olga="operator", vera="viewer"))
    viewer, operator = ({"authorization": f"Bearer {name}"} for name in ("vera", "olga"))
    denied = api(method, f"{ARTIFACTS_PATH}/{reference}", headers=headers | viewer)
    assert denied.status_code == 403
    assert "x-checksum-sha256" not in denied.headers
    if method == "GET":
        assert denied.json()["error"] == "artifact_contains_secret"
        assert DATA not in denied.content
    assert api(method, f"{ARTIFACTS_PATH}/{reference}", headers=headers | operator).status_code in {200, 206, 304}
    assert api(method, f"{ARTIFACTS_PATH}/report.bin", headers=headers | viewer).status_code in {200, 206, 304}
    assert api.get(ARTIFACTS_PATH, headers=viewer).json()["artifacts"][1]["contains_secret"] is True


def test_artifact_list_has_metadata_and_urls(api, add_artifact):
    add_artifact("a b#?%.md", data=b"x")
    response = api.get(ARTIFACTS_PATH).json()
    assert (response["task_id"], response["total_count"], response["total_size_bytes"]) == (
        "task-001",
        2,
        len(DATA) + 1,
    )
    assert response["artifacts"][0] == {
        "name": "report.bin",
        "path": "out/report.bin",
        "size_bytes": len(DATA),
        "content_type": "application/octet-stream",
        "checksum": f"sha256:{CHECKSUM}",
        "created_at": START_TIME.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "download_url": f"{ARTIFACTS_PATH}/report.bin",
        "contains_secret": False,
    }
    assert response["artifacts"][1]["download_url"] == f"{ARTIFACTS_PATH}/a%20b%23%3F%25.md"


@pytest.mark.parametrize("name", ["a b#?%.md", "näïve.txt", 'quo"te\\;.md', "line\nbreak\r\n", "%2e%2e", "🦊"])
def test_download_url_returns_an_artifact_with_any_name(api, add_artifact, name):
    add_artifact(name, data=name.encode())
    url = api.get(ARTIFACTS_PATH).json()["artifacts"][1]["download_url"]
    response = api.get(url)
    assert (response.status_code, response.content) == (200, name.encode())


def test_download_has_checksum_and_safe_headers(api):
    response = api.get(f"{ARTIFACTS_PATH}/report.bin")
    assert (response.status_code, response.content) == (200, DATA)
    assert response.headers["x-checksum-sha256"] == CHECKSUM
    assert response.headers["etag"] == f'"sha256:{CHECKSUM}"'
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["content-disposition"].startswith("attachment;")
    assert response.headers["content-length"] == str(len(DATA))


def test_artifact_is_found_by_escaped_or_plain_path(api):
    assert api.get(f"{ARTIFACTS_PATH}/out%2Freport.bin").content == DATA
    assert api.get(f"{ARTIFACTS_PATH}/out/report.bin").content == DATA


@pytest.mark.parametrize("name", ["other.bin", "..%2f..%2fetc%2fpasswd", "out", "report.bin/"])
def test_unknown_artifact_is_not_found(api, name):
    response = api.get(f"{ARTIFACTS_PATH}/{name}")
    assert (response.status_code, response.json()["error"]) == (404, "artifact_not_found")


def test_symlink_in_place_of_a_file_is_not_followed(api, add_artifact, tmp_path):
    file = add_artifact("link", data=b"x")
    file.unlink()
    file.symlink_to("/etc/hostname")
    assert api.get(f"{ARTIFACTS_PATH}/link").json()["error"] == "artifact_not_found"


def test_head_request_returns_the_size_without_a_body(api):
    response = api("HEAD", f"{ARTIFACTS_PATH}/report.bin")
    assert (response.status_code, response.content, response.headers["content-length"]) == (200, b"", str(len(DATA)))


@pytest.mark.parametrize("etag_list", ['"sha256:%s"', 'W/"sha256:%s"', '"other", "sha256:%s"', "*%.0s"])
def test_matching_etag_returns_304(api, etag_list):
    response = api.get(f"{ARTIFACTS_PATH}/report.bin", headers={"if-none-match": etag_list % CHECKSUM})
    assert (response.status_code, response.content) == (304, b"")
    assert response.headers["etag"] == f'"sha256:{CHECKSUM}"'
    assert api.get(f"{ARTIFACTS_PATH}/report.bin", headers={"if-none-match": '"other"'}).status_code == 200


def test_etags_may_span_several_headers(api):
    lines = [("if-none-match", '"other"'), ("if-none-match", f'"sha256:{CHECKSUM}"')]
    assert api("GET", f"{ARTIFACTS_PATH}/report.bin", headers=lines).status_code == 304


def test_download_has_no_last_modified_header(api):
    assert "last-modified" not in api.get(f"{ARTIFACTS_PATH}/report.bin").headers


@pytest.mark.parametrize(
    ("declared", "served"),
    [
        *((declared, "text/plain; charset=utf-8") for declared in (
            "text/x-python", "text/plain; charset=iso-8859-1", "text/x-diff", "text/html", "text/html; charset=utf-7",
            "TEXT/HTML", "text/css", "text/javascript", "application/javascript", "application/json", "application/xml",
            "application/x-ndjson", "application/yaml", "image/svg+xml", "text/xml", "text/xsl", "text/event-stream",
            "text/vtt", "text/cache-manifest",
        )),
        *((declared, declared) for declared in ("image/png", "image/jpeg", "image/gif", "image/webp")),
        *((declared, "application/octet-stream") for declared in (
            "application/pdf", "application/xhtml+xml", "application/x-shockwave-flash", "application/wasm",
            "application/manifest+json", "application/zip", "image/x-icon", "font/woff2", "video/mp4",
            "multipart/x-mixed-replace", "text/html; boundary=x", "text/\r\nx-evil: 1",
            "image/png; x=y", "message/rfc822", "application/speculationrules+json", "*/*", "text", "x",
        )),
    ],
)  # fmt: skip
@pytest.mark.parametrize("headers", [{}, {"range": "bytes=0-3"}])
def test_download_has_a_safe_type_but_the_list_has_the_declared_type(api, add_artifact, declared, served, headers):
    add_artifact("a.txt", data="grün".encode("latin-1"), content_type=declared)
    response = api.get(f"{ARTIFACTS_PATH}/a.txt", headers=headers)
    assert response.headers["content-type"] == served
    assert "x-evil" not in response.headers
    assert api.get(ARTIFACTS_PATH).json()["artifacts"][1]["content_type"] == declared


@pytest.mark.parametrize("headers", [{}, {"range": "bytes=0-3"}, {"if-none-match": "*"}])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_download_policy_forbids_scripts_and_frames(api, method, headers):
    policy = api(method, f"{ARTIFACTS_PATH}/report.bin", headers=headers).headers["content-security-policy"]
    assert {part.strip() for part in policy.split(";")} >= {"default-src 'none'", "frame-ancestors 'none'", "sandbox"}


@pytest.mark.parametrize(
    ("range_header", "status", "part"),
    [
        ("bytes=0-9", 206, DATA[:10]),
        ("bytes=10000-", 206, DATA[10000:]),
        ("bytes=-7", 206, DATA[-7:]),
        ("bytes=10000-99999", 206, DATA[10000:]),
        ("bytes=9-0", 200, DATA),
        ("bytes=0-1,5-6", 200, DATA),
        ("lines=1-2", 200, DATA),
        ("bytes=a-b", 200, DATA),
    ],
)
def test_single_range_is_served_but_other_ranges_return_the_whole_file(api, range_header, status, part):
    response = api.get(f"{ARTIFACTS_PATH}/report.bin", headers={"range": range_header})
    assert (response.status_code, response.content) == (status, part)


def test_if_range_header_resumes_only_a_file_with_a_matching_digest(api):
    same, other = f'"sha256:{CHECKSUM}"', '"sha256:other"'
    path, range_header = f"{ARTIFACTS_PATH}/report.bin", "bytes=5-"
    assert api.get(path, headers={"range": range_header, "if-range": same}).content == DATA[5:]
    assert api.get(path, headers={"range": range_header, "if-range": other}).content == DATA


@pytest.mark.parametrize("range_header", ["bytes=10240-", "bytes=99999-99999", "bytes=-0"])
def test_range_past_the_end_returns_416_with_size(api, range_header):
    response = api.get(f"{ARTIFACTS_PATH}/report.bin", headers={"range": range_header})
    assert (response.status_code, response.json()["error"]) == (416, "range_not_satisfiable")
    assert response.headers["content-range"] == f"bytes */{len(DATA)}"


@pytest.mark.parametrize("declared", ["text/html\r\nx-evil: 1", "nonsense", ""])
def test_invalid_content_type_becomes_octet_stream(api, add_artifact, declared):
    add_artifact("page", content_type=declared)
    response = api.get(f"{ARTIFACTS_PATH}/page")
    assert response.headers["content-type"] == "application/octet-stream"
    assert "x-evil" not in response.headers


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("report.md", "attachment; filename=\"report.md\"; filename*=UTF-8''report.md"),
        ('a"b.md', "attachment; filename=\"a_b.md\"; filename*=UTF-8''a%22b.md"),
        ("a\r\nb", "attachment; filename=\"a__b\"; filename*=UTF-8''a%0D%0Ab"),
        ("é", "attachment; filename=\"_\"; filename*=UTF-8''%C3%A9"),
    ],
)
def test_content_disposition_escapes_names(name, header):
    assert content_disposition(name) == header
