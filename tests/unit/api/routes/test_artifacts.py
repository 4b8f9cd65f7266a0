"""Somebody fetches what is kept of a task."""

import hashlib

import pytest

from doubles.fake_access import FakeAccess
from doubles.fake_tasks import BEGINNING
from sandbox.api.routes.artifacts import content_disposition
from sandbox.model.events import Artifact

DATA = bytes(range(256)) * 40
CHECKSUM = hashlib.sha256(DATA).hexdigest()
ARTIFACTS = "/api/v1/tasks/task-001/artifacts"


@pytest.fixture(autouse=True)
def keep(tasks, tmp_path):
    """Keeps artifacts; one `report.bin` is kept already."""
    tasks.add("task-001")

    def keep_one(name, path=None, data=DATA, kind="application/octet-stream", *, contains_secret=False):
        file = tmp_path / f"{len(tasks.stories['task-001'].artifacts)}"
        file.write_bytes(data)
        checksum = f"sha256:{hashlib.sha256(data).hexdigest()}"
        tasks.keep("task-001", Artifact(name, path or name, len(data), kind, checksum, contains_secret), file)
        return file

    keep_one("report.bin", "out/report.bin")
    return keep_one


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("headers", [{}, {"range": "bytes=0-3"}, {"if-none-match": "*"}])
@pytest.mark.parametrize("by", ["leaky.bin", "out%2Fleaky.bin"])
def test_what_contains_a_secret_is_for_operators(guarded_api, keep, method, headers, by):
    keep("leaky.bin", "out/leaky.bin", contains_secret=True)
    api = guarded_api(FakeAccess(olga="operator", vera="viewer"))
    viewer, operator = ({"authorization": f"Bearer {name}"} for name in ("vera", "olga"))
    refused = api(method, f"{ARTIFACTS}/{by}", headers=headers | viewer)
    assert refused.status_code == 403
    assert "x-checksum-sha256" not in refused.headers
    if method == "GET":
        assert refused.json()["error"] == "artifact_contains_secret"
        assert DATA not in refused.content
    assert api(method, f"{ARTIFACTS}/{by}", headers=headers | operator).status_code in {200, 206, 304}
    assert api(method, f"{ARTIFACTS}/report.bin", headers=headers | viewer).status_code in {200, 206, 304}
    assert api.get(ARTIFACTS, headers=viewer).json()["artifacts"][1]["contains_secret"] is True


def test_the_list_says_what_there_is_and_where(api, keep):
    keep("a b#?%.md", data=b"x")
    answer = api.get(ARTIFACTS).json()
    assert (answer["task_id"], answer["total_count"], answer["total_size_bytes"]) == ("task-001", 2, len(DATA) + 1)
    assert answer["artifacts"][0] == {
        "name": "report.bin",
        "path": "out/report.bin",
        "size_bytes": len(DATA),
        "content_type": "application/octet-stream",
        "checksum": f"sha256:{CHECKSUM}",
        "created_at": BEGINNING.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "download_url": f"{ARTIFACTS}/report.bin",
        "contains_secret": False,
    }
    assert answer["artifacts"][1]["download_url"] == f"{ARTIFACTS}/a%20b%23%3F%25.md"


@pytest.mark.parametrize("name", ["a b#?%.md", "näïve.txt", 'quo"te\\;.md', "line\nbreak\r\n", "%2e%2e", "🦊"])
def test_every_name_leads_to_its_bytes_by_the_url_of_the_list(api, keep, name):
    keep(name, data=name.encode())
    url = api.get(ARTIFACTS).json()["artifacts"][1]["download_url"]
    answer = api.get(url)
    assert (answer.status_code, answer.content) == (200, name.encode())


def test_a_download_is_safe_and_can_be_checked(api):
    answer = api.get(f"{ARTIFACTS}/report.bin")
    assert (answer.status_code, answer.content) == (200, DATA)
    assert answer.headers["x-checksum-sha256"] == CHECKSUM
    assert answer.headers["etag"] == f'"sha256:{CHECKSUM}"'
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-disposition"].startswith("attachment;")
    assert answer.headers["content-length"] == str(len(DATA))


def test_a_path_is_as_good_as_a_name_escaped_or_not(api):
    assert api.get(f"{ARTIFACTS}/out%2Freport.bin").content == DATA
    assert api.get(f"{ARTIFACTS}/out/report.bin").content == DATA


@pytest.mark.parametrize("name", ["other.bin", "..%2f..%2fetc%2fpasswd", "out", "report.bin/"])
def test_what_was_not_collected_is_not_served(api, name):
    answer = api.get(f"{ARTIFACTS}/{name}")
    assert (answer.status_code, answer.json()["error"]) == (404, "artifact_not_found")


def test_a_file_that_turned_into_a_link_is_not_followed(api, keep, tmp_path):
    file = keep("link", data=b"x")
    file.unlink()
    file.symlink_to("/etc/hostname")
    assert api.get(f"{ARTIFACTS}/link").json()["error"] == "artifact_not_found"


def test_head_tells_the_size_and_sends_nothing(api):
    answer = api("HEAD", f"{ARTIFACTS}/report.bin")
    assert (answer.status_code, answer.content, answer.headers["content-length"]) == (200, b"", str(len(DATA)))


@pytest.mark.parametrize("known", ['"sha256:%s"', 'W/"sha256:%s"', '"other", "sha256:%s"', "*%.0s"])
def test_who_has_the_bytes_is_not_sent_them_again(api, known):
    answer = api.get(f"{ARTIFACTS}/report.bin", headers={"if-none-match": known % CHECKSUM})
    assert (answer.status_code, answer.content) == (304, b"")
    assert answer.headers["etag"] == f'"sha256:{CHECKSUM}"'
    assert api.get(f"{ARTIFACTS}/report.bin", headers={"if-none-match": '"other"'}).status_code == 200


def test_known_etags_may_stand_on_several_lines(api):
    lines = [("if-none-match", '"other"'), ("if-none-match", f'"sha256:{CHECKSUM}"')]
    assert api("GET", f"{ARTIFACTS}/report.bin", headers=lines).status_code == 304


def test_no_time_of_a_change_is_named(api):
    assert "last-modified" not in api.get(f"{ARTIFACTS}/report.bin").headers


@pytest.mark.parametrize(
    ("kind", "served"),
    [
        *((kind, "text/plain; charset=utf-8") for kind in (
            "text/x-python", "text/plain; charset=iso-8859-1", "text/x-diff", "text/html", "text/html; charset=utf-7",
            "TEXT/HTML", "text/css", "text/javascript", "application/javascript", "application/json", "application/xml",
            "application/x-ndjson", "application/yaml", "image/svg+xml", "text/xml", "text/xsl", "text/event-stream",
            "text/vtt", "text/cache-manifest",
        )),
        *((kind, kind) for kind in ("image/png", "image/jpeg", "image/gif", "image/webp")),
        *((kind, "application/octet-stream") for kind in (
            "application/pdf", "application/xhtml+xml", "application/x-shockwave-flash", "application/wasm",
            "application/manifest+json", "application/zip", "image/x-icon", "font/woff2", "video/mp4",
            "multipart/x-mixed-replace", "text/html; boundary=x", "text/\r\nx-evil: 1",
            "image/png; x=y", "message/rfc822", "application/speculationrules+json", "*/*", "text", "x",
        )),
    ],
)  # fmt: skip
@pytest.mark.parametrize("headers", [{}, {"range": "bytes=0-3"}])
def test_a_download_has_a_type_that_no_browser_runs_and_the_list_tells_the_other(api, keep, kind, served, headers):
    keep("a.txt", data="grün".encode("latin-1"), kind=kind)
    answer = api.get(f"{ARTIFACTS}/a.txt", headers=headers)
    assert answer.headers["content-type"] == served
    assert "x-evil" not in answer.headers
    assert api.get(ARTIFACTS).json()["artifacts"][1]["content_type"] == kind


@pytest.mark.parametrize("headers", [{}, {"range": "bytes=0-3"}, {"if-none-match": "*"}])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_download_may_not_be_run_or_framed(api, method, headers):
    policy = api(method, f"{ARTIFACTS}/report.bin", headers=headers).headers["content-security-policy"]
    assert {part.strip() for part in policy.split(";")} >= {"default-src 'none'", "frame-ancestors 'none'", "sandbox"}


@pytest.mark.parametrize(
    ("asked", "status", "part"),
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
def test_one_range_is_served_and_anything_else_is_the_whole_file(api, asked, status, part):
    answer = api.get(f"{ARTIFACTS}/report.bin", headers={"range": asked})
    assert (answer.status_code, answer.content) == (status, part)


def test_a_broken_download_goes_on_only_if_the_file_is_the_same(api):
    same, other = f'"sha256:{CHECKSUM}"', '"sha256:other"'
    path, asked = f"{ARTIFACTS}/report.bin", "bytes=5-"
    assert api.get(path, headers={"range": asked, "if-range": same}).content == DATA[5:]
    assert api.get(path, headers={"range": asked, "if-range": other}).content == DATA


@pytest.mark.parametrize("asked", ["bytes=10240-", "bytes=99999-99999", "bytes=-0"])
def test_a_range_past_the_end_is_told_the_size(api, asked):
    answer = api.get(f"{ARTIFACTS}/report.bin", headers={"range": asked})
    assert (answer.status_code, answer.json()["error"]) == (416, "range_not_satisfiable")
    assert answer.headers["content-range"] == f"bytes */{len(DATA)}"


@pytest.mark.parametrize("kind", ["text/html\r\nx-evil: 1", "nonsense", ""])
def test_a_content_type_that_is_none_becomes_bytes(api, keep, kind):
    keep("page", kind=kind)
    answer = api.get(f"{ARTIFACTS}/page")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert "x-evil" not in answer.headers


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("report.md", "attachment; filename=\"report.md\"; filename*=UTF-8''report.md"),
        ('a"b.md', "attachment; filename=\"a_b.md\"; filename*=UTF-8''a%22b.md"),
        ("a\r\nb", "attachment; filename=\"a__b\"; filename*=UTF-8''a%0D%0Ab"),
        ("é", "attachment; filename=\"_\"; filename*=UTF-8''%C3%A9"),
    ],
)
def test_no_name_can_break_out_of_its_header(name, header):
    assert content_disposition(name) == header
