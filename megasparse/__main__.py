"""``python -m megasparse``, which is also what the deepspeed launcher starts."""

from megasparse.cli import main

if __name__ == "__main__":
    main()
