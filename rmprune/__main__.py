"""``python -m rmprune``."""

from rmprune.cli import main

if __name__ == "__main__":
    main(prog_name="rmprune")
