"""What runs in the guest, as root and as its first process. The guest has the host's Python and nothing of the package
but the code of this directory, so that only built-in and C modules and each other are imported here."""
