"""Exact diagonal Fisher, by limpet and by everyone else: what `benches/fisher_peers.py` measures."""
