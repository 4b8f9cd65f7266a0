"""By its fingerprint a set of values is known again, and none of them can be read."""

from sandbox.interfaces.secrets import make_fingerprint, matches_fingerprint

SECRETS = {"TOKEN": "hunter2-hunter2", "KEY": "pässwort\n"}


def test_the_same_values_are_known_again_and_no_others(tmp_path):
    path = tmp_path / "secrets.fingerprint"
    path.write_bytes(make_fingerprint(SECRETS))
    assert matches_fingerprint(path, dict(reversed(SECRETS.items())))
    for others in ({}, {"TOKEN": SECRETS["TOKEN"]}, SECRETS | {"KEY": "new"}, SECRETS | {"MORE": "x"}):
        assert not matches_fingerprint(path, others)
    assert b"hunter2" not in path.read_bytes()


def test_no_two_are_alike():
    assert make_fingerprint(SECRETS) != make_fingerprint(SECRETS)


def test_without_one_nothing_is_known(tmp_path):
    assert not matches_fingerprint(tmp_path / "secrets.fingerprint", SECRETS)


def test_what_a_crash_left_of_one_is_no_fingerprint(tmp_path):
    path = tmp_path / "secrets.fingerprint"
    path.write_bytes(b"")
    assert not matches_fingerprint(path, SECRETS)
