"""Back ends: the host's side of devices."""
