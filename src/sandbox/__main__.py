"""`python -m sandbox` is `sandbox`."""

from sandbox.cli.command import main

main()
