"""`python -m sa3_convert` is the command line."""

from sa3_convert.cli import main

if __name__ == "__main__":
    main()
