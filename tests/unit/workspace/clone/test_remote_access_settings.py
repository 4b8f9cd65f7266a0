"""The destination of a confined clone, and the user settings that are passed to the clone."""

from pathlib import Path

import pytest

from sandbox.workspace.clone.remote_access import SETTINGS_FILES_MAX, apply_instead_of, parse_settings, resolve_remote
from sandbox.workspace.clone.socks_proxy import HostPort

RELAY = ("http.proxy", "socks5h://127.0.0.1:3128")


@pytest.mark.parametrize(
    ("url", "rewritten"),
    [
        ("gh:a/b", "https://github.com/a/b"),
        ("gh:own/b", "ssh://git@own.example/b"),
        ("https://git.example/a", "https://git.example/a"),
        ("https://old.example/a", "https://me:pw@new.example/a"),
    ],
)
def test_longest_insteadof_rule_applies(url, rewritten):
    rules = [
        ("url.https://github.com/.insteadof", "gh:"),
        ("url.ssh://git@own.example/.insteadof", "gh:own/"),
        ("url.https://me:pw@new.example/.insteadof", "https://old.example/"),
        ("url.https://push.example/.pushinsteadof", "https://git.example/"),
    ]
    assert apply_instead_of(url, rules) == rewritten


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("https://git.example/a", HostPort("git.example", 443)),
        ("http://git.example:8080/a", HostPort("git.example", 8080)),
        ("https://me:pw@GIT.example./a", HostPort("git.example", 443)),
        ("https://[2001:db8::1]/a", HostPort("2001:db8::1", 443)),
        ("https://[2001:DB8:0:0::1]/a", HostPort("2001:db8::1", 443)),
        ("http://127.1/a", HostPort("127.0.0.1", 80)),
        ("http://0x7f.0.0.1/a", HostPort("127.0.0.1", 80)),
        ("git://git.example/a", None),
        ("/srv/a", None),
    ],
)
def test_remote_address_is_the_host_of_the_url(url, address):
    assert resolve_remote(url, [], "", Path("/")).address == address


def test_only_settings_for_the_host_are_passed():
    settings = [
        ("http.extraheader", "X: everywhere"),
        ("http.https://git.example/.extraheader", "X: own"),
        ("http.https://*.example/.extraheader", "X: domain"),
        ("http.https://other.org/.extraheader", "X: other"),
        ("http.https://[::::]/.extraheader", "X: nobody's"),
        ("http.proxy", "http://gone:1"),
        ("credential.helper", "store"),
        ("url.https://me:pw@x/.insteadof", "x:"),
        ("core.sshcommand", "ssh -i key"),
    ]
    passed_settings = resolve_remote("https://git.example/a", settings, "", Path("/")).settings
    assert [value for _, value in passed_settings] == ["X: everywhere", "X: own", "X: domain", RELAY[1]]


def test_contents_of_files_named_in_settings_are_passed(tmp_path):
    (tmp_path / "ca.pem").write_bytes(b"certificate")
    settings = [("http.sslcainfo", "~/ca.pem"), ("http.https://other.org/.sslkey", "/nonexistent")]
    remote = resolve_remote("https://git.example/a", settings, "", tmp_path)
    assert remote.settings == [("http.sslcainfo", "/etc/clone/0"), RELAY]
    assert remote.files == {"/etc/clone/0": b"certificate"}


def test_settings_refer_only_to_files_in_the_confinement(tmp_path):
    certificates = tmp_path / "certificates"
    certificates.mkdir()
    (certificates / "0a1b2c3d.0").write_bytes(b"one")
    (certificates / "0a1b2c3d.1").write_bytes(b"other")
    for name in ("pinned.pem", "ca.pem"):
        (tmp_path / name).write_bytes(name.encode())
    named = {"sslcapath": "~/certificates", "sslcainfo": "~/ca.pem", "pinnedpubkey": f"{tmp_path}/pinned.pem"}

    remote = resolve_remote(
        "https://git.example/a", [(f"http.{name}", path) for name, path in named.items()], "", tmp_path
    )

    passed_settings = dict(remote.settings)
    assert passed_settings.keys() == {"http.sslcapath", "http.sslcainfo", "http.pinnedpubkey", "http.proxy"}
    assert remote.files == {
        f"{passed_settings['http.sslcapath']}/0a1b2c3d.0": b"one",
        f"{passed_settings['http.sslcapath']}/0a1b2c3d.1": b"other",
        passed_settings["http.sslcainfo"]: b"ca.pem",
        passed_settings["http.pinnedpubkey"]: b"pinned.pem",
    }


def test_certificates_do_not_need_hashed_names(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "company.pem").write_bytes(b"certificate")
    remote = resolve_remote("https://git.example/a", [("http.sslcapath", str(tmp_path))], "", tmp_path)
    assert remote.settings == [("http.sslcapath", "/etc/clone/0"), RELAY]
    assert remote.files == {"/etc/clone/0/company.pem": b"certificate"}


def test_only_certificates_with_hashed_names_are_passed_if_there_are_too_many(tmp_path):
    for number in range(SETTINGS_FILES_MAX):
        (tmp_path / f"{number}.pem").write_bytes(b"certificate")
    (tmp_path / "0a1b2c3d.0").symlink_to("0.pem")
    remote = resolve_remote("https://git.example/a", [("http.sslcapath", str(tmp_path))], "", tmp_path)
    assert remote.files == {"/etc/clone/0/0a1b2c3d.0": b"certificate"}


@pytest.mark.parametrize("directory", ["/etc/ssl/certs", "/usr/share/certificates", ""])
def test_system_certificate_directories_are_not_copied(directory):
    setting = ("http.sslcapath", directory)
    remote = resolve_remote("https://git.example/a", [setting], "", Path("/"))
    assert (remote.settings, remote.files) == ([setting, RELAY], {})


def test_pinned_key_hash_is_not_a_file(tmp_path):
    pinned = ("http.pinnedpubkey", "sha256//YhKJKSzoTt2b5FP18fvpHo7fJYqQCjAa3HWY3tvRMwE=")
    remote = resolve_remote("https://git.example/a", [pinned], "", tmp_path)
    assert (remote.settings, remote.files) == ([pinned, RELAY], {})


def test_certificate_error_names_the_setting(tmp_path):
    settings = [("http.https://me:pw@git.example/.sslcapath", "~/")]
    with pytest.raises(OSError, match=r"http\.sslcapath of the server's user .*contains no certificate"):
        resolve_remote("https://git.example/a", settings, "", tmp_path)
    for number in range(SETTINGS_FILES_MAX + 1):
        (tmp_path / f"{number}.pem").touch()
    with pytest.raises(OSError, match=r"http\.sslcapath .*into one file .* http\.sslCAInfo"):
        resolve_remote("https://git.example/a", settings, "", tmp_path)
    with pytest.raises(OSError, match=r"http\.sslcapath .*gone, .*: No such file"):
        resolve_remote("https://git.example/a", [("http.sslcapath", "~/gone")], "", tmp_path)


def test_cookie_file_may_be_missing(tmp_path):
    settings = [("http.cookiefile", ""), ("http.https://git.example/.cookiefile", "~/not-yet")]
    remote = resolve_remote("https://git.example/a", settings, "", tmp_path)
    assert remote.settings == [("http.cookiefile", ""), ("http.https://git.example/.cookiefile", ""), RELAY]
    assert remote.files == {}


def test_unreadable_file_error_names_the_setting(tmp_path):
    settings = [("http.https://me:pw@git.example/.sslcainfo", "~/gone.pem")]
    with pytest.raises(OSError, match=r"http\.sslcainfo of the server's user is .*/gone\.pem, .*: No such file"):
        resolve_remote("https://git.example/a", settings, "", tmp_path)
    with pytest.raises(OSError, match=r"http\.cookiefile .*: Is a directory"):
        resolve_remote("https://git.example/a", [("http.cookiefile", "~/.")], "", tmp_path)


def test_proxy_auth_method_is_passed():
    settings = [("remote.origin.proxyauthmethod", "basic"), ("http.proxyauthmethod", "digest")]
    passed_settings = resolve_remote(
        "https://git.example/a", settings, "http://me:pw@proxy.corp:8080", Path("/")
    ).settings
    assert set(settings) < set(passed_settings)


@pytest.mark.parametrize(
    ("proxy", "upstream_proxy", "proxy_in_confinement", "has_hosts_file"),
    [
        ("http://me:pw@proxy.corp:8080", HostPort("proxy.corp", 8080), "http://me:pw@proxy.corp:3128", True),
        ("proxy.corp:8080", HostPort("proxy.corp", 8080), "http://proxy.corp:3128", True),
        ("socks5h://10.0.0.1:1080", HostPort("10.0.0.1", 1080), "socks5h://127.0.0.1:3128", False),
        ("https://proxy.corp", HostPort("proxy.corp", 443), "https://proxy.corp:3128", True),
        ("socks5://proxy.corp", HostPort("proxy.corp", 1080), "socks5h://proxy.corp:3128", True),
        ("socks4://10.0.0.1:1081", HostPort("10.0.0.1", 1081), "socks4a://127.0.0.1:3128", False),
    ],
)
def test_user_proxy_is_reached_through_the_relay(proxy, upstream_proxy, proxy_in_confinement, has_hosts_file):
    remote = resolve_remote("https://git.example/a", [], proxy, Path("/"))
    assert (remote.upstream_proxy, remote.settings) == (upstream_proxy, [("http.proxy", proxy_in_confinement)])
    assert ("/etc/hosts" in remote.files) == has_hosts_file


def test_relevant_settings_are_parsed_in_order():
    output = (
        b"user.name\nMe\0credential.helper\n\0credential.https://x.helper\nstore\0"
        b"url.https://me:pw@x/.insteadof\nhttps://y/\0"
        b"http.sslverify\0http.https://x/.proxy\nhttp://p\0ssh.variant\nssh\0core.sshcommand\nssh -4\0"
        b"core.hookspath\n/h\0"
        b"core.fsmonitor\n/f\0filter.lfs.smudge\ngit-lfs\0remote.origin.proxy\nhttp://q\0remote.origin.uploadpack\n/u\0"
        b"include.path\n/i\0alias.x\n!sh\0protocol.ext.allow\nalways\0"
    )

    assert parse_settings(output) == [
        ("credential.helper", ""),
        ("credential.https://x.helper", "store"),
        ("url.https://me:pw@x/.insteadof", "https://y/"),
        ("http.sslverify", "true"),
        ("http.https://x/.proxy", "http://p"),
        ("ssh.variant", "ssh"),
        ("core.sshcommand", "ssh -4"),
        ("remote.origin.proxy", "http://q"),
    ]
