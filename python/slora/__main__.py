"""`slora`, and `python -m slora`."""

import sys


def main() -> int:
    """Ctrl-C is quiet from the start: importing takes a moment, too."""
    try:
        from slora.cli import main

        return main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
