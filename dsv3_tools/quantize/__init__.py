"""Calibrated quantization: what a layer's inputs say about which errors of its weights matter."""
