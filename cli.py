"""Start the command line from a source checkout: ``python cli.py fit``."""

from edgetrain.cli import main

if __name__ == "__main__":
    main()
