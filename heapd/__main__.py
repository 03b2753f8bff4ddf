"""`python -m heapd`: the command line."""

from heapd.cli import main

if __name__ == "__main__":
    main()
