"""What calibration gains on inputs of known statistics: the figures behind `tests/quantize/test_matrix.py`.

    python benchmarks/gptq_gains.py

The tests' own inputs and measures, so that these are the figures whose thresholds they check: dB of less
output error than rounding with scales of the largest weight, on 8,192 tokens that no Hessian has seen; 1,024
inputs, 256 outputs.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dsv3_tools.quantize.gram import shrink  # noqa: E402
from dsv3_tools.quantize.matrix import factorize, quantize_matrix  # noqa: E402
from tests.quantize.conftest import inputs_of  # noqa: E402
from tests.quantize.test_matrix import GAINS, INT4, gain, gram_of, weight  # noqa: E402


def main() -> None:
    """Prints a row for each kind of inputs, then what shrinkage does."""
    weight_nk = weight()
    print("| inputs | columns | GPTQ, dB | weighted scales, dB |\n|---|---|---|---|")
    for kind, in_order in GAINS:
        hessian, held_out = gram_of(inputs_of(kind, 8192, 1)).mean(), inputs_of(kind, 8192, 2)
        factor = factorize(hessian, 0.01, in_order=in_order)
        found = [
            gain(weight_nk, quantize_matrix(weight_nk, hessian, INT4, f), held_out) for f in (factor, None)
        ]
        print(f"| {kind} | {'by size' if in_order else 'as they are'} | {found[0]:.2f} | {found[1]:.2f} |")
    layer, held_out = gram_of(inputs_of("power law", 8192, 1)), inputs_of("power law", 8192, 2)
    for count in (256, 1024):
        own = gram_of(inputs_of("power law", count, 3))
        found = [
            gain(weight_nk, quantize_matrix(weight_nk, hessian, INT4, factorize(hessian, 0.01)), held_out)
            for hessian in (own.mean(), shrink(own, layer))
        ]
        print(
            f"{count} tokens of an expert: {found[0]:.2f} dB by its own, {found[1]:.2f} dB with the layer's"
        )


if __name__ == "__main__":
    main()
