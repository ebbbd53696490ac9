"""The HTML page of `dsv3 verify logits --report`: one file that opens offline."""
