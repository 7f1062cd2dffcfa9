"""Long work: it may be stopped, killed and shared out, and it says how far it is."""
