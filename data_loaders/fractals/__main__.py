"""`python -m data_loaders.fractals`: see `data_loaders.fractals.sets`."""

from data_loaders.fractals.sets import main

if __name__ == "__main__":
    raise SystemExit(main())
