"""Migration: its settings, addresses, progress, the state stream, and what the sections of the stream belong to."""
