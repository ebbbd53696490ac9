"""`verify tensors` passes what the conversions make, and names the place of every planted fault."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch as st
import torch

import dsv3_tools
from dsv3_tools.conversion.progress import Progress, Stop
from dsv3_tools.errors import CheckpointError, Interrupted, UsageError
from dsv3_tools.formats import FORMATS, Dense, INT4Packed, INT8Block
from dsv3_tools.kernels import cpu_equal, cpu_errors
from dsv3_tools.kernels.compare import BlockErrors, Steps, compare_blocks
from dsv3_tools.verify import sides
from dsv3_tools.verify.expectations import CLAMP_STEPS, INT4_SNR, expectation
from dsv3_tools.verify.stripes import stripes
from dsv3_tools.verify.tensors import TensorReport

EXPERT = "model.layers.2.mlp.experts.{}.up_proj"
NORM = "model.layers.1.input_layernorm.weight"
BIAS = "model.layers.2.mlp.gate.e_score_correction_bias"
INDEX = "model.safetensors.index.json"

Make = tuple[str, str, dict[str, Any]]


def quantized(function: str, source: str = "fp8", **options: Any) -> Make:
    return function, source, options


MADE: dict[str, Make] = {  # from what, by which function, with which options
    "int8 block": quantized("quantize_int8", scheme="block"),
    "int8 channel": quantized("quantize_int8"),
    "int4": quantized("quantize_int4"),
    "int4 asymmetric": quantized("quantize_int4", group_size=32, symmetric=False),
    "gptq": quantized("quantize_int4", layout="gptq"),
    "awq": quantized("quantize_int4", layout="awq"),
    "rest fp8": quantized("quantize_int4", rest="fp8", group_size=64),
    "no mtp": quantized("quantize_int4", mtp="drop", group_size=64),
    "resharded": quantized("quantize_int8", max_shard_size=3_000_000),
    "bf16": quantized("convert_fp8_to_bf16"),
    "int4 of bf16": quantized("quantize_int4", "bf16"),
    "fp8 again": quantized("convert_bf16_to_fp8", "bf16"),
    "ue8m0": quantized("convert_bf16_to_fp8", "bf16", scale_fmt="ue8m0"),
}


@pytest.fixture(scope="module")
def make(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that returns the shipped model in a format, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("made")

    def made(name: str) -> Path:
        if name == "fp8":
            return miniature
        if not (folder / name).exists():
            function, source, options = MADE[name]
            getattr(dsv3_tools, function)(made(source), folder / name, device="cpu", **options)
        return folder / name

    return made


def edit(checkpoint: Path, name: str, change: Callable[[np.ndarray], Any], dtype: str = "u1") -> None:
    """Changes a tensor in its file."""
    with dsv3_tools.Checkpoint(checkpoint) as opened:
        (shard, offset), nbytes = opened.location(name), opened.specs[name].nbytes
    data = np.memmap(checkpoint / shard, "u1", "r+", offset, (nbytes,))
    change(data.view(dtype))
    data.flush()


def read(checkpoint: Path, name: str) -> torch.Tensor:
    with dsv3_tools.Checkpoint(checkpoint) as opened:
        return opened.read(name)


def rewrite(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Writes the checkpoint again, as one shard, after a change of its tensors."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        tensors |= st.load_file(path)
        path.unlink()
    change(tensors)
    st.save_file(tensors, checkpoint / "model-00001-of-000001.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(tensors, "model-00001-of-000001.safetensors")
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def only_problem(report: TensorReport) -> str:
    (problem,) = report.problems
    assert not report.passed
    return problem


# ------------------------------------------------------------------------------------------------ it passes


@pytest.mark.parametrize("name", ["fp8", *MADE])
def test_what_the_conversions_make_passes(make: Callable[[str], Path], name: str) -> None:
    report = dsv3_tools.verify_tensors(make("fp8"), make(name))
    if name == "ue8m0":  # codes from weights that had been rounded
        assert any("quantized from a BF16 copy" in note for note in report.notes)
    assert report.problems == ()
    assert report.num_compared == report.num_parameters == (263 if name == "no mtp" else 331)
    exact = all(row.exact == 1 for row in report.formats)
    assert exact == (name in ("fp8", "bf16", "fp8 again"))
    assert all(row.exact == 1 for row in report.formats if row.candidate in ("bf16", "f32", "fp8_block"))
    assert (report.worst == ()) == exact


@pytest.mark.parametrize("name", ["fp8", "int8 block", "int8 channel", "int4", "gptq", "awq", "int4 of bf16"])
def test_against_bf16(make: Callable[[str], Path], name: str) -> None:
    report = dsv3_tools.verify_tensors(make("bf16"), make(name))
    assert report.problems == ()
    assert {row.reference for row in report.formats} == {"bf16", "f32"}


def test_layouts_of_the_same_codes_are_exact(make: Callable[[str], Path]) -> None:
    report = dsv3_tools.verify_tensors(make("int4"), make("awq"), exact=True)
    assert report.problems == ()
    assert {(row.reference, row.candidate, row.exact) for row in report.formats} >= {
        ("int4_packed g128", "int4_awq g128", 1.0)
    }


def test_the_reference_may_be_the_lossy_side(make: Callable[[str], Path]) -> None:
    assert dsv3_tools.verify_tensors(make("int4"), make("fp8")).passed


def test_the_ratio_is_what_torch_says(make: Callable[[str], Path]) -> None:
    report = dsv3_tools.verify_tensors(make("fp8"), make("int8 channel"), workers=1)
    result = next(r for r in report.weights if r.name == EXPERT.format(3) + ".weight")
    decoded = []
    for name, fmt in (("fp8", FORMATS["fp8_block"]), ("int8 channel", FORMATS["int8_channel"])):
        parts = {part: read(make(name), f"{EXPERT.format(3)}.{part}") for part in fmt.part_names}
        decoded.append(fmt.decode(parts, dtype="F32").double())
    error = decoded[0] - decoded[1]
    assert result.snr == pytest.approx(
        float(10 * torch.log10(decoded[0].square().sum() / error.square().sum()))
    )
    assert result.max_error == pytest.approx(float(error.abs().max() / decoded[0].abs().max()), rel=1e-6)
    assert result.num_equal == int((error == 0).sum())
    blocks = [float(block.square().sum()) for row in error.split(128) for block in row.split(128, dim=1)]
    across = -(-error.shape[1] // 128)
    row, column = divmod(int(np.argmax(blocks)), across)
    assert result.worst_block == (128 * row, 128 * column)


@pytest.mark.parametrize("name", ["int4", "int8 block", "bf16"])
def test_the_number_of_workers_changes_nothing(make: Callable[[str], Path], name: str) -> None:
    one = dsv3_tools.verify_tensors(make("fp8"), make(name), workers=1)
    assert dsv3_tools.verify_tensors(make("fp8"), make(name), workers=3) == one


def test_progress_and_stop(make: Callable[[str], Path]) -> None:
    seen: list[Progress] = []
    report = dsv3_tools.verify_tensors(make("fp8"), make("int4"), on_progress=seen.append)
    assert seen[-1].nbytes_done == seen[-1].nbytes_total == report.nbytes
    assert (seen[-1].shards_done, seen[-1].shards_total) == (4, 4)
    stop = Stop()
    with pytest.raises(Interrupted) as caught:
        dsv3_tools.verify_tensors(
            make("fp8"), make("int4"), stop=stop, on_progress=lambda _: stop.set(15), workers=2
        )
    assert caught.value.exit_code == 143


def test_a_sample_is_drawn_by_its_seed(make: Callable[[str], Path]) -> None:
    def names(**options: Any) -> list[str]:
        report = dsv3_tools.verify_tensors(make("fp8"), make("int4"), **options)
        assert report.sample is not None
        assert report.num_parameters == 331
        return [result.name for result in report.weights]

    assert names(sample=20) == names(sample=20, workers=1) != names(sample=20, seed=1)
    assert len(names(sample=0.1)) == 33
    assert len(names(sample=1)) == 1
    assert len(names(sample=10**6)) == 331


@pytest.mark.parametrize(
    "options",
    [{"sample": 0}, {"sample": 1.5}, {"sample": -1}, {"device": "tpu"}, {"exact": True, "min_snr": 3.0}],
)
def test_options_that_make_no_sense(miniature: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        dsv3_tools.verify_tensors(miniature, miniature, **options)


# ------------------------------------------------------------------------------------------------- it fails


def swap_experts(checkpoint: Path) -> None:
    with dsv3_tools.Checkpoint(checkpoint) as opened:
        parts = [name.rpartition(".")[2] for name in opened.specs if name.startswith(EXPERT.format(3) + ".")]
    for part in parts:
        three, four = (f"{EXPERT.format(number)}.{part}" for number in (3, 4))
        first, second = (read(checkpoint, name).flatten().view(torch.uint8).numpy() for name in (three, four))
        edit(checkpoint, three, lambda data, new=second: data.__setitem__(slice(None), new))
        edit(checkpoint, four, lambda data, new=first: data.__setitem__(slice(None), new))


@pytest.mark.parametrize("name", ["bf16", "int8 block", "int8 channel", "int4", "gptq", "awq", "fp8 again"])
def test_two_experts_swapped(make: Callable[[str], Path], copied, name: str) -> None:
    candidate = copied(make(name))
    swap_experts(candidate)
    report = dsv3_tools.verify_tensors(make("fp8"), candidate)
    assert [p.partition(".weight: ")[0] for p in report.problems] == [EXPERT.format(3), EXPERT.format(4)]


SCALES = {
    "int8 block": ("weight_scale_inv", "<f4"),
    "int8 channel": ("weight_scale", "<f4"),
    "int4": ("weight_scale", "<i2"),
    "gptq": ("scales", "<i2"),
    "awq": ("scales", "<i2"),
    "ue8m0": ("weight_scale_inv", "<f4"),
    "fp8 again": ("weight_scale_inv", "<f4"),
}


@pytest.mark.parametrize("factor", [2, 0.5])
@pytest.mark.parametrize("name", SCALES)
def test_one_scale_doubled_or_halved(make: Callable[[str], Path], copied, name: str, factor: float) -> None:
    candidate = copied(make(name))
    part, dtype = SCALES[name]

    def change(scales: np.ndarray) -> None:
        if dtype == "<i2":  # BF16: the exponent begins at bit 7
            scales[5] += 128 if factor == 2 else -128
        else:
            scales[1] *= factor

    edit(candidate, f"{EXPERT.format(3)}.{part}", change, dtype)
    problem = only_problem(dsv3_tools.verify_tensors(make("bf16"), candidate))
    assert problem.startswith(EXPERT.format(3) + ".weight: ")
    assert "[" in problem


@pytest.mark.parametrize("bit", [0, 3, 7])
@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("fp8 again", "weight"),
        ("ue8m0", "weight"),
        ("bf16", "weight"),
        ("int8 block", "weight"),
        ("int8 channel", "weight"),
        ("int4", "weight_packed"),
        ("gptq", "qweight"),
        ("awq", "qweight"),
    ],
)
def test_one_flipped_bit(make: Callable[[str], Path], copied, name: str, part: str, bit: int) -> None:
    candidate = copied(make(name))
    reference = make("bf16") if name in ("ue8m0", "int4") else make("fp8")
    edit(
        candidate, f"{EXPERT.format(5)}.{part}", lambda data: data.__setitem__(1234, data[1234] ^ (1 << bit))
    )
    report = dsv3_tools.verify_tensors(reference, candidate)
    assert only_problem(report).startswith(EXPERT.format(5) + ".weight: ")
    (result,) = (result for result in report.worst if result.problem)
    if name in ("fp8 again", "bf16"):
        index = 617 if name == "bf16" else 1234
        width = read(make("bf16"), EXPERT.format(5) + ".weight").shape[1]
        assert f"the first at [{index // width}, {index % width}]" in str(result.problem)
        assert result.num_elements - result.num_equal == 1


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_an_element_whose_square_is_infinite(make: Callable[[str], Path], copied, name: str) -> None:
    candidate = copied(make("bf16"))
    edit(candidate, EXPERT.format(5) + ".weight", lambda bits: bits.__setitem__(3, 0x7F00), "<u2")
    problem = only_problem(dsv3_tools.verify_tensors(make(name), candidate))
    assert "1 of 32,768 elements differ: the first at [0, 3] is 1.70141e+38" in problem


@pytest.mark.parametrize("name", ["bf16", "int8 channel", "int4"])
def test_small_tensors(make: Callable[[str], Path], copied, name: str) -> None:
    candidate = copied(make(name))

    def one_percent_off(bits: np.ndarray) -> None:
        values = torch.from_numpy(bits.copy().view(np.int16)).view(torch.bfloat16)
        bits[:] = (values * 1.01).view(torch.int16).numpy().view(np.uint16)

    def rounded(values: np.ndarray) -> None:
        values[:] = torch.from_numpy(values.copy()).bfloat16().float().numpy()

    edit(candidate, NORM, one_percent_off, "<u2")
    edit(candidate, BIAS, rounded, "<f4")
    problems = dsv3_tools.verify_tensors(make("fp8"), candidate).problems
    assert [p.partition(": ")[0] for p in problems] == [NORM, BIAS]
    assert "elements differ: the first at [0]" in problems[0]


def test_a_router_bias_stored_in_bf16(make: Callable[[str], Path], copied) -> None:
    candidate = copied(make("bf16"))
    rewrite(candidate, lambda tensors: tensors.update({BIAS: tensors[BIAS].bfloat16()}))
    problem = only_problem(dsv3_tools.verify_tensors(make("fp8"), candidate))
    assert problem.startswith(f"{BIAS}: is BF16, expected F32")


def test_a_norm_in_another_type_is_the_same_norm(make: Callable[[str], Path], copied) -> None:
    candidate = copied(make("bf16"))
    rewrite(candidate, lambda tensors: tensors.update({NORM: tensors[NORM].float()}))
    for pair in ((make("fp8"), candidate), (candidate, make("fp8"))):
        report = dsv3_tools.verify_tensors(*pair, exact=pair[1] == candidate, sample=None)
        assert not [p for p in report.problems if "norm" in p]
    edit(candidate, NORM, lambda values: values.__imul__(1.01), "<f4")
    assert NORM in only_problem(dsv3_tools.verify_tensors(make("fp8"), candidate))


def test_the_mtp_module_of_another_model(make: Callable[[str], Path], copied) -> None:
    candidate = copied(make("int4"))
    with dsv3_tools.Checkpoint(candidate) as opened:
        names = [name for name, spec in opened.specs.items() if "layers.5." in name and spec.dtype == "I32"]
    noise = np.random.default_rng(0)
    for name in names:
        edit(candidate, name, lambda data: data.__setitem__(slice(None), noise.permutation(data)))
    report = dsv3_tools.verify_tensors(make("fp8"), candidate)
    assert len(report.problems) == len(names) == 48
    assert all(problem.startswith("model.layers.5.mlp.experts.") for problem in report.problems)
    assert sum(row.failed for row in report.formats) == 48


def test_the_mtp_module_dropped(make: Callable[[str], Path], copied) -> None:
    report = dsv3_tools.verify_tensors(make("fp8"), make("no mtp"))
    assert report.notes[0].startswith("the candidate has no MTP module: 68 parameters of layer 5")
    candidate = copied(make("no mtp"))
    config = json.loads((candidate / "config.json").read_text())
    (candidate / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    problem = only_problem(dsv3_tools.verify_tensors(make("fp8"), candidate))
    assert problem.startswith("68 parameters are missing in the candidate: model.layers.5.")


def test_tensors_missing_left_over_and_of_other_shapes(make: Callable[[str], Path], copied) -> None:
    candidate = copied(make("int4"))
    gone, packed = EXPERT.format(6) + ".weight_scale", EXPERT.format(7) + ".weight_packed"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[gone]
        del tensors[NORM]
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
        tensors["model.layers.9.input_layernorm.weight"] = torch.zeros(3)
        tensors["stranger"] = torch.zeros(3)
        tensors[packed] = tensors[packed][:, :-1].clone()

    rewrite(candidate, change)
    text = "; ".join(dsv3_tools.verify_tensors(make("fp8"), candidate).problems)
    for said in (
        f"1 parameters are missing in the candidate: {NORM}",
        "1 parameters are in the candidate alone: model.layers.9.input_layernorm.weight",
        "stranger is not a tensor of this family",
        "model.norm.weight: has the shape [255], expected [256]",
        f"{EXPERT.format(6)}.weight_packed lacks its weight_scale",
        f"{EXPERT.format(7)}.weight: has the shape",
    ):
        assert said in text


@pytest.mark.parametrize(
    ("name", "tensor", "bits", "dtype"),
    [
        ("bf16", EXPERT.format(2) + ".weight", 0x7FC0, "<u2"),
        ("int4", NORM, 0x7F80, "<u2"),
        ("int4", EXPERT.format(2) + ".weight_scale", 0x7FC0, "<u2"),
        ("int8 block", EXPERT.format(2) + ".weight_scale_inv", 0x7F800000, "<u4"),
        ("fp8 again", EXPERT.format(2) + ".weight", 0x7F, "u1"),
    ],
)
def test_nan_planted(make, copied, name: str, tensor: str, bits: int, dtype: str) -> None:
    candidate = copied(make(name))
    edit(candidate, tensor, lambda data: data.__setitem__(1, bits), dtype)
    report = dsv3_tools.verify_tensors(make("fp8"), candidate)
    assert only_problem(report).startswith(tensor.rpartition(".")[0])
    assert "not finite" in only_problem(report)


def test_nan_on_both_sides_is_the_same(make, copied, tmp_path: Path) -> None:
    reference = copied(make("fp8"))
    edit(reference, EXPERT.format(2) + ".weight", lambda data: data.__setitem__(1, 0x7F))
    dsv3_tools.convert_fp8_to_bf16(reference, tmp_path / "out", nonfinite="keep", device="cpu")
    report = dsv3_tools.verify_tensors(reference, tmp_path / "out")
    assert report.passed
    assert report.notes[0].startswith("1 weights hold NaN or infinity, the same on both sides")


def test_parts_that_follow_from_the_shape(make, copied) -> None:
    candidate = copied(make("gptq"))
    edit(candidate, EXPERT.format(2) + ".g_idx", lambda data: data.__setitem__(0, 1))
    assert EXPERT.format(2) + ".g_idx: does not hold" in only_problem(
        dsv3_tools.verify_tensors(make("fp8"), candidate)
    )


def test_codes_that_are_not_the_nearest_need_a_threshold(make, copied) -> None:
    candidate = copied(make("int8 channel"))
    edit(candidate, EXPERT.format(2) + ".weight", lambda codes: codes.clip(-100, 99, codes).__iadd__(1), "i1")
    report = dsv3_tools.verify_tensors(make("fp8"), candidate)
    assert EXPERT.format(2) in only_problem(report)
    assert dsv3_tools.verify_tensors(make("fp8"), candidate, min_snr=20.0).passed
    assert not dsv3_tools.verify_tensors(make("fp8"), candidate, min_snr=40.0).passed


def test_exact_refuses_what_lost_something(make: Callable[[str], Path]) -> None:
    assert dsv3_tools.verify_tensors(make("bf16"), make("fp8"), exact=True).passed
    assert len(dsv3_tools.verify_tensors(make("fp8"), make("int4"), exact=True).problems) == 240


def test_config_that_changes_the_model_is_noted(make: Callable[[str], Path], copied) -> None:
    candidate = copied(make("bf16"))
    config = json.loads((candidate / "config.json").read_text())
    (candidate / "config.json").write_text(json.dumps(config | {"rope_theta": 5}))
    assert "config.json differs, too, which changes the model: rope_theta" in (
        dsv3_tools.verify_tensors(make("fp8"), candidate).notes
    )


# ----------------------------------------------------------------------------- its kernels, and without them


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has every weight decoded before it is compared."""
    monkeypatch.setattr(cpu_equal, "equal_nbytes", lambda *_: 0)
    monkeypatch.setattr(cpu_equal, "are_equal_weights", lambda *_: False)
    monkeypatch.setattr(cpu_errors, "measure_codes", lambda *_, **__: None)


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize(
    ("reference", "name"),
    [
        *(
            ("fp8", name)
            for name in ("fp8", "bf16", "int8 block", "int8 channel", "int4", "awq", "int4 of bf16")
        ),
        *(("bf16", name) for name in ("fp8", "ue8m0", "int8 channel", "int4 asymmetric")),
        ("int4", "fp8"),
        ("int8 block", "int4"),
    ],
)
def test_decoding_gives_the_same_report(
    make: Callable[[str], Path],
    copied,
    monkeypatch: pytest.MonkeyPatch,
    reference: str,
    name: str,
    damaged: bool,
) -> None:
    candidate = copied(make(name))
    if damaged:
        chance = np.random.default_rng(3)
        with dsv3_tools.Checkpoint(candidate) as opened:
            names = [n for n, spec in opened.specs.items() if ".experts." in n and spec.nbytes > 1000]
        for tensor in chance.choice(names, 20, replace=False):
            edit(
                candidate,
                tensor,
                lambda data: data.__setitem__(chance.integers(data.size), chance.integers(256)),
            )
    fast = dsv3_tools.verify_tensors(make(reference), candidate)
    without_kernels(monkeypatch)
    slow = dsv3_tools.verify_tensors(make(reference), candidate)
    assert not (damaged and fast.passed)
    for a, b in zip(fast.weights, slow.weights, strict=True):
        for one, other in ((a.snr, b.snr), (a.max_steps, b.max_steps)):  # sums of floats in another order
            assert one == (other if other is None else pytest.approx(other, rel=1e-6, abs=1e-5))
        assert replace(a, snr=b.snr, max_steps=b.max_steps) == b
    assert (fast.problems, fast.notes) == (slow.problems, slow.notes)


@pytest.mark.parametrize("name", ["fp8", "bf16", "int8 channel", "int4"])
def test_a_file_shortened_meanwhile(
    make: Callable[[str], Path], copied, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    candidate = copied(make(name))
    opened = sides.Side.read_ahead

    def shorten(side: sides.Side, *arguments: Any) -> None:
        for path in candidate.glob("*.safetensors"):
            os.truncate(path, path.stat().st_size // 2)
        opened(side, *arguments)

    monkeypatch.setattr(sides.Side, "read_ahead", shorten)
    with pytest.raises(CheckpointError, match="it was shortened after it was opened"):
        dsv3_tools.verify_tensors(make("fp8"), candidate)


# ---------------------------------------------------------------------------------------------- its pieces


def test_every_pair_of_formats_has_an_expectation() -> None:
    for reference in FORMATS.values():
        for candidate in FORMATS.values():
            found = expectation(reference, candidate)
            assert found.reason
            assert (found.lossy is None) == (found.min_snr is None)
            if reference == candidate:
                assert found.equality == "bytes"
    thresholds = [snr for snr, _ in INT4_SNR.values()]
    assert thresholds == sorted(thresholds, reverse=True)
    assert expectation(Dense(), INT4Packed(group_size=-1)).min_snr == 15.0


@pytest.mark.parametrize("shape", [(1, 1), (128, 7168), (300, 5000), (129, 18432), (7,), (), (0, 4)])
def test_stripes_cover_every_row_once(shape: tuple[int, ...]) -> None:
    for formats in ((Dense(), Dense()), (FORMATS["fp8_block"], INT8Block((64, 64)))):
        rows = [row for top, height in stripes(shape, formats) for row in range(top, top + height)]
        assert rows == list(range(len(rows)))
        if len(shape) == 2:
            assert len(rows) == shape[0]


@pytest.mark.parametrize("sign", [1, -1])
def test_steps_of_integers_by_hand(sign: int) -> None:
    """Codes from -8 to 7 with a step of 1/4; a weight beyond the last code is clamped."""
    weight = np.array([[0.0, 0.3, -1.0, 2.5, -3.0, 1.0]], "f4")
    coded = np.array([[0.0, 0.25, -0.75, 1.75, -2.0, 0.5]], "f4")
    expected = [0, 0.2, 1, 3, 4, 2]
    steps = Steps(
        np.full((1, 1), 4.0 * sign, "f4"), np.full((1, 1), -8.0 if sign == 1 else -7.0, "f4"), 15.0, (1, 6)
    )
    for column, value in enumerate(expected):
        out = BlockErrors.zeros(1, 1)
        one = slice(column, column + 1)
        bits = np.ascontiguousarray(weight[:, one]).view("u4"), np.ascontiguousarray(coded[:, one]).view("u4")
        compare_blocks(*bits, out, top=0, steps=steps, clamp=CLAMP_STEPS)
        clamped = column in (3, 4)
        assert float(out.steps[0, 0]) == pytest.approx(value / CLAMP_STEPS if clamped else value, abs=1e-5)


def test_nearest_e4m3_codes_are_half_a_step_off_at_most() -> None:
    """Every code and what lies half-way to its neighbours, negative control: a little more."""
    codes = torch.arange(0, 126, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    after = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    steps = Steps(np.full((1, 1), 1 / 3, "f4"), np.zeros((1, 1), "f4"), None, (128, 128))
    for share, bound in ((0.5, 0.501), (0.52, 0.53)):
        weight = (codes + (after - codes) * share) * 3
        out = BlockErrors.zeros(1, 126)
        bits = [np.ascontiguousarray(t.numpy()[None]).view("u4") for t in (weight, codes * 3)]
        compare_blocks(*bits, out, top=0, steps=steps)
        assert share - 0.001 <= float(out.steps.max()) <= bound


# ----------------------------------------------------------------------------------------------- its memory

PEAK = """
import json, sys
import dsv3_tools
def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))
warm_up, large, workers = sys.argv[1:]
dsv3_tools.verify_tensors(warm_up, warm_up, workers=int(workers))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
report = dsv3_tools.verify_tensors(large, large, workers=int(workers))
assert report.passed and report.nbytes > 1e9
print(status("VmHWM") - before)
"""


def test_memory_is_bounded_by_the_workers(miniature: Path, tmp_path: Path) -> None:
    """A tensor of 410 MB and a shard of 1.3 GB, both sparse."""
    sizes = {"hidden_size": 2048, "vocab_size": 100_000, "intermediate_size": 50_000}
    sizes |= {"tie_word_embeddings": True, "num_nextn_predict_layers": 0}
    dsv3_tools.sample(tmp_path / "large", layers=1, shards=1, overrides=sizes, sparse=True)
    command = [sys.executable, "-c", PEAK, str(miniature), str(tmp_path / "large"), "2"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 200e6
    shutil.rmtree(tmp_path / "large")
