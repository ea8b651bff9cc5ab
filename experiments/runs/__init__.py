"""One run and all runs of a configuration: resumed, saved, locked."""
