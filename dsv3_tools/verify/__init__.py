"""Proofs that a checkpoint is what it should be."""
