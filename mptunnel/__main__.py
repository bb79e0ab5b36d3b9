"""`python -m mptunnel` is the program."""

from mptunnel.cli import main

if __name__ == "__main__":
    main()
