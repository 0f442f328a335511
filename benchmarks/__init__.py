"""Ours and its peers, side by side in one run: `make bench`. One module a benchmark, one JSON file a result."""
