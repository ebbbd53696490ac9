"""Trains and exports the miniature DeepSeek-V3 model that ships with dsv3-tools: see README.md."""
