"""Searches draft length, placement, prefetch, micro-batches and threads for the best plan that fits."""
