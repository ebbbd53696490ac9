"""What is on disk: headers, names, configurations, shards."""
