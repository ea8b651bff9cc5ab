"""HDF5 records: written, read, compared, tabulated and drawn."""
