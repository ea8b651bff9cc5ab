"""`python -m data_loaders.imagenet`: see `data_loaders.imagenet.packing`."""

from data_loaders.imagenet.packing import main

if __name__ == "__main__":
    raise SystemExit(main())
