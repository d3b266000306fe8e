"""`python -m jax_moe`; see `_cli.py`."""

import sys

from jax_moe._cli import main

if __name__ == "__main__":
    sys.exit(main())
