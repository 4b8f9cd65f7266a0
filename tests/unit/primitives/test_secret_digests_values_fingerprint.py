"""Fingerprints identify a set of secret values without revealing them."""

from sandbox.primitives.secret_digests import make_fingerprint, matches_fingerprint

SECRETS = {"TOKEN": "hunter2-hunter2", "KEY": "pässwort\n"}


def test_fingerprint_matches_only_the_values_from_which_it_was_created(tmp_path):
    path = tmp_path / "secrets.fingerprint"
    path.write_bytes(make_fingerprint(SECRETS))
    assert matches_fingerprint(path, dict(reversed(SECRETS.items())))
    for others in ({}, {"TOKEN": SECRETS["TOKEN"]}, SECRETS | {"KEY": "new"}, SECRETS | {"MORE": "x"}):
        assert not matches_fingerprint(path, others)
    assert b"hunter2" not in path.read_bytes()


def test_fingerprints_are_salted():
    assert make_fingerprint(SECRETS) != make_fingerprint(SECRETS)


def test_missing_fingerprint_matches_nothing(tmp_path):
    assert not matches_fingerprint(tmp_path / "secrets.fingerprint", SECRETS)


def test_empty_fingerprint_file_matches_nothing(tmp_path):
    path = tmp_path / "secrets.fingerprint"
    path.write_bytes(b"")
    assert not matches_fingerprint(path, SECRETS)
