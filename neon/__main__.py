"""`python -m neon` (and `torchrun -m neon`) is the `neon` command."""

from neon.cli.main import main

if __name__ == "__main__":
    main(prog_name="neon")
