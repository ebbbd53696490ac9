"""Plans and runs: from one checkpoint to another, streaming and resumable."""
