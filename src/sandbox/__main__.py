"""Makes `python -m sandbox` equivalent to the command `sandbox`."""

from sandbox.cli.main import main

main()
