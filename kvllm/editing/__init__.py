"""Editors, their training loop, preservation, and the algebra of low-rank deltas. Knows nothing of ledgers or files."""
