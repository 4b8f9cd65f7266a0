"""Git errors are converted to helpful messages without secrets."""

import time

import pytest

from sandbox.model.manifest.schema import Repository
from sandbox.workspace.clone.clone_and_checkout import explain_clone_failure, redact_credentials
from sandbox.workspace.clone.remote_access import find_values_to_redact
from sandbox.workspace.git_command import last_error_line

REPOSITORY = Repository(url="https://git.example/x.git", branch="main")


@pytest.mark.parametrize(
    ("stderr", "expected"),
    [
        ("fatal: Remote branch main not found in upstream origin", "no branch 'main'"),
        ("fatal: could not read Username for 'https://x': terminal prompts disabled", "needs credentials"),
        ("git@x: Permission denied (publickey).\nfatal: Could not read from remote repository.", "needs credentials"),
        ("Host key verification failed.\nfatal: Could not read from remote repository.", "known_hosts"),
        ("fatal: repository 'https://git.example/x.git/' not found", "there is no repository"),
        ("fatal: unable to access 'https://x/': Could not resolve host: x", "cannot be resolved"),
        ("ssh: Could not resolve hostname x: Name or service not known", "cannot be resolved"),
        ("ssh -o BatchMode=yes: 1: ssh: not found\nfatal: Could not read from remote repository.", "openssh-client"),
        ("ssh -4: line 1: ssh: command not found\nfatal: Could not read from remote repository.", "openssh-client"),
        (
            "sh: 1: /srv/my-ssh: not found\nfatal: Could not read from remote repository.",
            "git reported: fatal: Could not",
        ),
        ("ssh: connect to host x port 22: Connection refused", "cannot be reached"),
        ("fatal: unable to access 'https://x/': Failed to connect to x port 443", "cannot be reached"),
        ("fatal: unable to access 'https://x/': SSL certificate problem: expired", "TLS"),
        ("fatal: transport 'file' not allowed", "only https, http and ssh"),
        (
            "error: index-pack died of signal 25\nfatal: fetch-pack: invalid index-pack output",
            "larger than the size limit for clones",
        ),
        ("fatal: fetch-pack: invalid index-pack output", "larger than the size limit for clones"),
        ("fatal: fsck error in packed object\nfatal: fetch-pack: invalid index-pack output", "malformed objects"),
        ("fatal: write error: No space left on device", "raise vm.disk"),
        ("fatal: fsck error in packed object", "malformed objects"),
        ("fatal: early EOF\nfatal: out of memory: the kernel ended git", "raise vm.memory"),
        ("fatal: unable to access 'https://x/openssl.git/': The requested URL returned error: 503", "server error"),
        ("fatal: unable to access 'https://x/classlib/': The requested URL returned error: 500", "server error"),
        ("fatal: unable to access 'https://x/openssl.git/': gnutls_handshake() failed", "TLS"),
        ("fatal: unable to access 'https://x/redirect/': Couldn't connect to server", "cannot be reached"),
        ("fatal: unable to access 'https://x/redirect/': SSL certificate problem: expired", "TLS"),
        (
            "fatal: unable to update url base from redirection:\n  asked for: https://x\n   redirect: https://y",
            "use the final one",
        ),
        ("", "git reported: nothing"),
    ],
)
def test_known_git_errors_have_advice(stderr, expected):
    message = explain_clone_failure(stderr, REPOSITORY, ())

    assert message.startswith("Cannot clone https://git.example/x.git: ")
    assert expected in message


def test_unknown_git_error_is_shown_after_redaction():
    secrets = find_values_to_redact(
        [("http.https://x/.extraheader", "Authorization: Bearer abcdefghijkl"), ("credential.helper", "store")]
    )
    stderr = "warning: odd\nfatal: odd thing at http://me:pw@proxy/ with abcdefghijkl\x1b[2J" + "x" * 1000

    message = explain_clone_failure(stderr, REPOSITORY, secrets)

    assert "odd thing at http://***@proxy/ with ***?[2J" in message
    assert "abcdefghijkl" not in message
    assert len(message) < 400


def test_long_words_in_a_credential_helper_setting_are_treated_as_secrets():
    assert find_values_to_redact([("credential.helper", "!f() { echo password=hunter2hunter2; }; f")]) >= {
        "password=hunter2hunter2;"
    }
    assert (
        redact_credentials("store of stores", find_values_to_redact([("credential.helper", "store")]))
        == "store of stores"
    )
    assert find_values_to_redact([("url.https://x/.insteadof", "https://public.example/")]) == frozenset()


def test_last_meaningful_error_line_is_used():
    assert last_error_line("remote: hello\nfatal: one\nhint: try that\n") == "fatal: one"
    assert last_error_line("only\nwords") == "words"
    assert last_error_line("") == ""


@pytest.mark.parametrize(
    "word", ["a", "repository '", "remote branch ", "SOCKS5 connection to ", "transport '", "a://"]
)
def test_long_error_line_is_parsed_quickly(word):
    """While an error is being parsed, the attempt cannot be cancelled and cannot end."""
    stderr = "remote: " + word * (1024**2 // len(word)) + "\nfatal: early EOF"
    started = time.process_time()

    assert "the connection broke" in explain_clone_failure(stderr, REPOSITORY, ())
    assert time.process_time() - started < 5


def test_only_the_last_lines_are_searched_for_the_cause():
    hidden, early = "remote branch main not found", "\n" * 1000
    assert "git reported: fatal: x" in explain_clone_failure(f"{hidden}{early}fatal: x", REPOSITORY, ())
    assert "no branch 'main'" in explain_clone_failure(f"{early}{hidden}\nfatal: x", REPOSITORY, ())


def test_error_after_a_long_url_is_recognized():
    stderr = f"fatal: unable to access 'https://git.example/{'x' * 2000}/': Failed to connect to x port 443"
    assert "cannot be reached" in explain_clone_failure(stderr, REPOSITORY, ())
