"""The experiment suite: `python -m experiments run | reproduce | figures | summarize`."""
