"""What a model needs, where each byte goes and how long a step takes, before anything is allocated."""
