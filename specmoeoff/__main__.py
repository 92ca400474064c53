"""`python -m specmoeoff` is the same program as `specmoeoff`."""

from specmoeoff.cli import main

main()
