"""``python -m t2i_align`` is the command line."""

from t2i_align.cli import main

if __name__ == "__main__":
    main()
