"""Only settings for access to repositories are read from the server user's git configuration."""

from sandbox.workspace.clone.remote import parse_settings


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
