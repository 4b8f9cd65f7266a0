"""`python -m sandbox` is `sandbox`."""

from sandbox.cli.main import main

main()
