"""``python -m methodbench``: the command line, where its script is not on the path."""

from methodbench.cli import main

if __name__ == "__main__":
    main()
