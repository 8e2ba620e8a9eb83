"""`python -m apreqel`, the same program as the `apreqel` command."""

from apreqel.cli import main

if __name__ == "__main__":
    main()
