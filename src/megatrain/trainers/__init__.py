"""Trainers of transformers and TRL on a streamed model."""
