"""The phases of a machine, a function a file, and the table of its commands."""
