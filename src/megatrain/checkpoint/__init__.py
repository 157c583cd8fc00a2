"""Training state on disk: written beside training, whole or not there, and read back to the last bit."""
