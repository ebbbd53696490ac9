"""Whole calibrated runs of a small model: the same bytes however they are done, and a result that loads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

import dsv3_tools
from dsv3_tools.checkpoint.files import read_shard_header
from dsv3_tools.checkpoint.manifest import QUANTIZATION_NAME
from dsv3_tools.conversion.making import Made, Place
from dsv3_tools.conversion.plan import ShardPlan
from dsv3_tools.errors import CheckpointError, DestinationError, UsageError
from dsv3_tools.formats.stored import find_weights, read_formats
from dsv3_tools.quantize import calibrator

OPTIONS: dict[str, Any] = {"method": "gptq", "device": "cpu", "group_size": 32, "save_every": 1}


def quantize(source: Path, out: Path, tokens: Path, kind: str = "int4", **options: Any) -> Any:
    function = getattr(dsv3_tools, f"quantize_{kind}")
    return function(source, out, calibration=tokens, **{**OPTIONS, **options})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def expected(tiny: Path, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one run in one process writes."""
    out = tmp_path_factory.mktemp("expected") / "out"
    quantize(tiny, out, tokens)
    return out


def test_what_is_written(tiny: Path, tokens: Path, expected: Path) -> None:
    assert not (expected / ".dsv3").exists()
    with dsv3_tools.Checkpoint(expected) as checkpoint:
        stored = find_weights(checkpoint.specs, read_formats(checkpoint.config_json, "config.json"))
        for weight in stored.weights:
            is_expert = ".mlp.experts." in weight.full_name
            assert (weight.format.name == "int4_packed") == is_expert, weight.full_name
    assert dsv3_tools.verify_integrity(expected).passed
    manifest = json.loads((expected / "dsv3_manifest.json").read_bytes())
    calibration = manifest["options"]["calibration"]
    assert calibration["tokens"] == {
        "sequences": 12,
        "length": 40,
        "held_out": 1,
        "sha256": calibration["tokens"]["sha256"],
    }
    assert (calibration["method"], calibration["dtype"]) == ("gptq", "F32")
    assert calibration["device"].startswith("cpu")
    assert calibration["torch"] == torch.__version__
    assert QUANTIZATION_NAME in manifest["files"]


def test_every_layer_has_shards_of_its_own(expected: Path, tiny: Path, tokens: Path, tmp_path: Path) -> None:
    for folder, limit in ((expected, None), (tmp_path / "small", 30_000)):
        if limit is not None:
            quantize(tiny, folder, tokens, max_shard_size=limit)
        for path in folder.glob("*.safetensors"):
            specs = read_shard_header(folder, path.name).header.specs
            layers = {name.split(".")[2] if name.startswith("model.layers.") else "" for name in specs}
            assert len(layers) == 1, path
            if limit is not None and len(specs) > 3:
                assert sum(spec.nbytes for spec in specs.values()) <= limit
    assert decoded(expected) == decoded(tmp_path / "small")


def decoded(folder: Path) -> dict[str, bytes]:
    with dsv3_tools.Checkpoint(folder) as checkpoint:
        return {name: bytes(checkpoint.read_bytes(name)) for name in checkpoint.specs}


def test_report(expected: Path) -> None:
    report = json.loads((expected / QUANTIZATION_NAME).read_bytes())
    assert report["recipe"]["method"] == "gptq"
    lines = {(line["layer"], line["kind"]): line for line in report["summary"]}
    assert {layer for layer, _ in lines} == {1, 2, 3, 4}  # the MTP layer is the last
    assert {kind for _, kind in lines} == {"experts.gate_up", "experts.down_proj"}
    for line in lines.values():
        assert line["num_matrices"] == 6
        assert line["predicted_gain"] > 0.0
        assert line["without_factor"] == 0
        assert 0.0 < line["error"] < 0.5
    for layer in report["layers"]:
        routed = 11 * (40 if layer["number"] < 4 else 39) * 2
        assert sum(layer["expert_tokens"]) == routed
    few = [line["few_tokens"] for line in lines.values() if line["kind"] == "experts.gate_up"]
    assert sum(few) == sum(
        matrix["tokens"] < matrix["inputs"]
        for layer in report["layers"]
        for matrix in layer["matrices"]
        if matrix["name"].endswith("gate_up")
    )


class Stopped(Exception):
    """Ends a run where it stands."""


def stopping_at(number: int) -> Any:
    """Returns `Calibrator.make` that ends after so many batches, all of which are written."""
    make = calibrator.Calibrator.make

    def stopped(self: Any, missing: Sequence[ShardPlan], place: Place) -> Iterator[Made]:
        with closing(make(self, missing, place)) as batches:  # or it would end, and undo things, much later
            for count, batch in enumerate(batches, start=1):
                yield batch
                if count == number:
                    raise Stopped

    return stopped


@pytest.mark.parametrize("save_every", [1, 2, 99])
def test_resumed_is_straight(
    tiny: Path,
    tokens: Path,
    expected: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    save_every: int,
) -> None:
    """Stopped after every batch in turn, until it is done: never more is lost than since the last save."""
    out = tmp_path / "out"
    for number in range(1, 12):
        with monkeypatch.context() as patch:
            patch.setattr(calibrator.Calibrator, "make", stopping_at(number % 3 + 1))
            try:
                result = quantize(tiny, out, tokens, save_every=save_every)
                break
            except Stopped:
                assert not (out / "model.safetensors.index.json").exists()
    else:
        result = quantize(tiny, out, tokens, save_every=save_every)
    assert files(out) == files(expected)
    assert quantize(tiny, out, tokens).already_complete
    assert result.shards_resumed > 0


def test_a_layer_that_is_written_is_not_quantized_again(
    tiny: Path, tokens: Path, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(calibrator.Calibrator, "make", stopping_at(3))
        with pytest.raises(Stopped):
            quantize(tiny, out, tokens, save_every=99)
    done = []
    with monkeypatch.context() as patch:
        real = calibrator.LayerWork.quantize
        patch.setattr(
            calibrator.LayerWork,
            "quantize",
            lambda self, *args: (done.append(self._number), real(self, *args))[1],
        )
        quantize(tiny, out, tokens, save_every=99)
    assert done == [0, 3, 4]  # layer 0 is dense and has nothing to quantize
    assert files(out) == files(expected)


def test_a_damaged_save_is_refused(
    tiny: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(calibrator.Calibrator, "make", stopping_at(5))
        with pytest.raises(Stopped):
            quantize(tiny, out, tokens)
    (saved,) = (out / ".dsv3" / "made").glob("states-*.safetensors")
    data = saved.read_bytes()
    saved.write_bytes(data[:-4])
    with pytest.raises(CheckpointError, match="states-"):
        quantize(tiny, out, tokens)


def test_other_options_do_not_go_on(
    tiny: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(calibrator.Calibrator, "make", stopping_at(3))
        with pytest.raises(Stopped):
            quantize(tiny, out, tokens)
    for other in ({"damping": 0.02}, {"max_tokens": 400}, {"method": "rtn-weighted"}, {"dtype": "BF16"}):
        with pytest.raises(DestinationError, match="other options"):
            quantize(tiny, out, tokens, **other)


SCRIPT = """
import sys
from dsv3_tools.cli import main
sys.argv[0] = "dsv3"
main()
"""


def test_two_ranks_write_what_one_does(tiny: Path, tokens: Path, expected: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += [str(tmp_path / "script.py"), "quantize", "int4", str(tiny), str(out), "--method", "gptq"]
    command += ["--device", "cpu", "--group-size", "32", "--calibration", str(tokens), "--save-every", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert files(out) == files(expected)


@pytest.mark.parametrize("place", ["host", "file"])
def test_wherever_hidden_states_are(
    tiny: Path,
    tokens: Path,
    expected: Path,
    tmp_path: Path,
    place: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    real = calibrator.choose_place
    monkeypatch.setattr(calibrator, "choose_place", lambda *args: seen.append(real(*args)) or seen[-1])
    quantize(tiny, tmp_path / "out", tokens, memory=1 if place == "file" else None)
    assert seen == [place]
    assert files(tmp_path / "out") == files(expected)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "weighted": ("int4", {"method": "rtn-weighted"}),
    "asymmetric": ("int4", {"symmetric": False}),
    "gptq layout": ("int4", {"layout": "gptq"}),
    "awq layout": ("int4", {"layout": "awq", "symmetric": False}),
    "g64": ("int4", {"group_size": 64}),
    "rest fp8": ("int4", {"rest": "fp8"}),
    "mtp keep": ("int4", {"mtp": "keep"}),
    "mtp drop": ("int4", {"mtp": "drop"}),
    "shared experts": ("int4", {"include": ["*.shared_experts.*"]}),
    "kv_b_proj": ("int4", {"include": ["*.self_attn.kv_b_proj"]}),
    "a layer left out": ("int4", {"exclude": ["model.layers.2.*"]}),
    "int8": ("int8", {}),
    "int8 weighted": ("int8", {"method": "rtn-weighted"}),
}


@pytest.mark.parametrize("name", CASES)
def test_every_option(tiny: Path, tokens: Path, tmp_path: Path, name: str) -> None:
    """Calibrated and not, the same tensors with the same specs; nearer to the original on its own inputs."""
    kind, options = CASES[name]
    if kind == "int8":
        options = {**options, "group_size": None}
    given = {key: value for key, value in {**OPTIONS, **options}.items() if value is not None}
    function = getattr(dsv3_tools, f"quantize_{kind}")
    function(tiny, tmp_path / "calibrated", calibration=tokens, **given)
    plain = {k: v for k, v in given.items() if k not in ("method", "save_every")}
    function(tiny, tmp_path / "plain", **plain)
    with (
        dsv3_tools.Checkpoint(tmp_path / "calibrated") as one,
        dsv3_tools.Checkpoint(tmp_path / "plain") as other,
    ):
        assert dict(one.specs) == dict(other.specs)
        assert one.config_json == other.config_json
    report = json.loads((tmp_path / "calibrated" / QUANTIZATION_NAME).read_bytes())
    gains = [line["gain"] for line in report["summary"]]
    assert sum(gains) / len(gains) > (-0.1 if kind == "int8" else 0.1)
    assert dsv3_tools.verify_integrity(tmp_path / "calibrated").passed
    assert dsv3_tools.verify_structure(tmp_path / "calibrated").passed


def test_int8_takes_every_kind_of_linear(tiny: Path, tokens: Path, tmp_path: Path) -> None:
    options = {key: value for key, value in OPTIONS.items() if key != "group_size"}
    dsv3_tools.quantize_int8(tiny, tmp_path / "out", calibration=tokens, **options)
    report = json.loads((tmp_path / "out" / QUANTIZATION_NAME).read_bytes())
    kinds = {line["kind"] for line in report["summary"]}
    assert kinds == {
        "self_attn.q_a_proj",
        "self_attn.kv_a_proj_with_mqa",
        "self_attn.q_b_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
        "mlp.shared_experts.gate_proj",
        "mlp.shared_experts.up_proj",
        "mlp.shared_experts.down_proj",
        "experts.gate_up",
        "experts.down_proj",
    }


def test_from_bf16(tiny: Path, tokens: Path, expected: Path, tmp_path: Path) -> None:
    """The forward pass is the same; the float32 product is quantized from FP8, its rounding from BF16."""
    dsv3_tools.convert_fp8_to_bf16(tiny, tmp_path / "bf16", device="cpu")
    quantize(tmp_path / "bf16", tmp_path / "out", tokens)
    one, other = decoded(expected), decoded(tmp_path / "out")
    names = [name for name in one if name.endswith("weight_packed")]
    same = [
        (
            torch.frombuffer(bytearray(one[name]), dtype=torch.uint8)
            == torch.frombuffer(bytearray(other[name]), dtype=torch.uint8)
        )
        .float()
        .mean()
        for name in names
    ]
    assert sum(same) / len(same) > 0.7  # bytes of two codes


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "int8 blocks": ("int8", {"scheme": "block"}, "--scheme channel"),
    "method": ("int4", {"method": "awq"}, "expected one of gptq, rtn-weighted"),
    "damping": ("int4", {"damping": 0.0}, "--damping 0.0"),
    "dtype": ("int4", {"dtype": "F16"}, "--dtype F16"),
    "save": ("int4", {"save_every": 0}, "--save-every 0"),
    "one sequence": ("int4", {"max_tokens": 40}, "expected at least 2"),
    "no method": ("int4", {"method": "rtn"}, "has no use for it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tiny: Path, tokens: Path, tmp_path: Path, name: str) -> None:
    kind, options, message = REFUSED[name]
    given = {**OPTIONS, **options}
    if kind == "int8":
        del given["group_size"]
    with pytest.raises(UsageError, match=message):
        getattr(dsv3_tools, f"quantize_{kind}")(tiny, tmp_path / "out", calibration=tokens, **given)
    assert not (tmp_path / "out").exists()


def test_nothing_left_to_calibrate(expected: Path, tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing is to be changed|nothing to calibrate"):
        quantize(expected, tmp_path / "out", tokens)
    with pytest.raises(CheckpointError, match="nothing to calibrate"):
        quantize(expected, tmp_path / "out", tokens, layout="gptq")


def test_a_nan_is_refused(tiny: Path, tokens: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    with dsv3_tools.Checkpoint(source) as checkpoint:
        name = "model.layers.2.mlp.experts.1.up_proj.weight"
        shard, offset = checkpoint.location(name)
    with (source / shard).open("r+b") as file:
        file.seek(offset + 5)
        file.write(b"\x7f")
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.experts\.1\.up_proj"):
        quantize(source, tmp_path / "out", tokens)
