"""`dsv3 card`: what it prints, and how it fails."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def result(copied, bf16_checkpoint: Path) -> Path:
    """A result that the test may change."""
    made: Path = copied(bf16_checkpoint)
    return made


def test_it_writes_only_what_changed(dsv3, result: Path) -> None:
    outcome = dsv3("card", result)
    assert (outcome.code, outcome.out, outcome.err) == (0, f"unchanged: {result}/README.md\n", "")
    text = (result / "README.md").read_text()
    (result / "README.md").unlink()
    assert dsv3("card", result).out == f"wrote {result}/README.md\n"
    assert (result / "README.md").read_text() == text


def test_the_figures_of_a_real_report(dsv3, fp8_checkpoint: Path, result: Path, tmp_path: Path) -> None:
    report = tmp_path / "tensors.json"
    report.write_text(dsv3("verify", "tensors", fp8_checkpoint, result, "--json").out)
    outcome = dsv3("card", result, "--figures", report, "--json")
    assert outcome.document == {"path": str(result / "README.md"), "written": True, "figures": ["tensors"]}
    text = (result / "README.md").read_text()
    assert "| verify tensors | passed | yes |" in text
    assert "| verify tensors | fp8_block to bf16 |" in text
    assert dsv3("verify", "integrity", result).code == 0
    assert dsv3("card", result).out == f"unchanged: {result}/README.md, with figures of verify tensors\n"


def test_the_report_of_a_failed_command_is_refused(dsv3, result: Path, tmp_path: Path) -> None:
    report = tmp_path / "error.json"
    report.write_text(dsv3("verify", "tensors", tmp_path, result, "--json").out)
    outcome = dsv3("card", result, "--figures", report)
    assert outcome.code == 3
    assert "is not what dsv3 verify logits, tensors or mtp print" in outcome.error_line


def test_the_report_of_another_checkpoint_is_refused(
    dsv3, fp8_checkpoint: Path, result: Path, tmp_path: Path
) -> None:
    report = tmp_path / "tensors.json"
    report.write_text(dsv3("verify", "tensors", fp8_checkpoint, fp8_checkpoint, "--json").out)
    outcome = dsv3("card", result, "--figures", report)
    assert outcome.code == 2
    assert f"is about {fp8_checkpoint}, expected {result}" in outcome.error_line
    assert not (result / "dsv3_figures.json").exists()


def test_a_directory_that_is_no_result(dsv3, fp8_checkpoint: Path) -> None:
    outcome = dsv3("card", fp8_checkpoint)
    assert outcome.code == 3
    assert outcome.error_line == (
        f"dsv3: {fp8_checkpoint}: has no dsv3_manifest.json, expected a result of dsv3-tools"
    )
    assert dsv3("card", fp8_checkpoint, "--json").document["exit_code"] == 3


def test_a_run_says_that_it_has_left_a_readme_alone(dsv3, fp8_checkpoint: Path, result: Path) -> None:
    (result / "README.md").write_text("---\na: [1\n---\nmine\n")
    assert dsv3("card", result).code == 3
    line = ["quantize", "int8", fp8_checkpoint, result, "--overwrite", "--device", "cpu"]
    outcome = dsv3(*line)
    assert outcome.code == 0
    assert "README.md: its front matter is not YAML" in outcome.error_line
    assert (result / "README.md").read_text() == "---\na: [1\n---\nmine\n"
    (result / "README.md").write_text("mine\n")
    (result / "config.json").unlink()
    outcome = dsv3(*line)
    assert (outcome.code, outcome.err) == (0, "")
    assert (result / "README.md").read_text().startswith("---\n")
