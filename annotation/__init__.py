"""The correction page: its server, the file of corrections, agreement between annotators."""
