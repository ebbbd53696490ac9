#!/usr/bin/env bash
# Converts the shipped FP8 model to BF16 and back, shows that every tensor has its old bytes again, and quantizes it.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${DEMO:-/tmp/dsv3-demo}
rm -rf "$out"

say() { printf '\n$ %s\n' "$*"; "$@"; }

say dsv3 inspect miniature/checkpoint
say dsv3 convert fp8-to-bf16 miniature/checkpoint "$out/bf16" --device cpu
say dsv3 verify integrity "$out/bf16"
say dsv3 convert bf16-to-fp8 "$out/bf16" "$out/fp8" --like miniature/checkpoint --device cpu
say dsv3 quantize int4 miniature/checkpoint "$out/int4" --device cpu
say dsv3 check "$out/int4"
say dsv3 verify tensors miniature/checkpoint "$out/int4"
say dsv3 verify logits miniature/checkpoint "$out/int4" --max-tokens 2048
say python examples/same_bytes.py miniature/checkpoint "$out/fp8"
