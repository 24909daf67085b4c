"""``python -m methodbench.cli``."""

from methodbench.cli import main

if __name__ == "__main__":
    main()
