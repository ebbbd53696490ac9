"""The forward pass of DeepSeek-V3 as published, with weights streamed from a checkpoint of any format."""
