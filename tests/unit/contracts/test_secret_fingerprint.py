"""By its fingerprint a set of values is known again, and none of them can be read."""

from sandbox.contracts.secret_fingerprint import has_fingerprint, leave_fingerprint

SECRETS = {"TOKEN": "hunter2-hunter2", "KEY": "pässwort\n"}


def test_the_same_values_are_known_again_and_no_others(tmp_path):
    path = tmp_path / "secrets.fingerprint"
    leave_fingerprint(path, SECRETS)
    assert has_fingerprint(path, dict(reversed(SECRETS.items())))
    for others in ({}, {"TOKEN": SECRETS["TOKEN"]}, SECRETS | {"KEY": "new"}, SECRETS | {"MORE": "x"}):
        assert not has_fingerprint(path, others)
    assert [each.name for each in tmp_path.iterdir()] == ["secrets.fingerprint"]
    assert b"hunter2" not in path.read_bytes()


def test_the_first_one_stays(tmp_path):
    path = tmp_path / "secrets.fingerprint"
    leave_fingerprint(path, SECRETS)
    leave_fingerprint(path, {"TOKEN": "another value"})
    assert has_fingerprint(path, SECRETS)


def test_without_secrets_there_is_none_and_without_one_nothing_is_known(tmp_path):
    path = tmp_path / "secrets.fingerprint"
    leave_fingerprint(path, {})
    assert not path.exists()
    assert not has_fingerprint(path, SECRETS)


def test_what_a_crash_left_of_one_is_no_fingerprint(tmp_path):
    path = tmp_path / "secrets.fingerprint"
    path.write_bytes(b"")
    assert not has_fingerprint(path, SECRETS)
