"""Live update: a running guest goes from one process to the next without its memory being copied."""
