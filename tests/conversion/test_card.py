"""The model card of every command: true, repeatable, readable for the Hub, and never over a user's text."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from huggingface_hub import ModelCard

import dsv3_tools
from dsv3_tools.checkpoint.manifest import encode_manifest, parse_manifest
from dsv3_tools.cli import app
from dsv3_tools.conversion.card import card, card_problem
from dsv3_tools.conversion.card_text import code, escape, fenced, shell
from dsv3_tools.conversion.card_yaml import parse_card
from dsv3_tools.conversion.destination import read_manifest
from dsv3_tools.engines import ENGINES
from dsv3_tools.errors import CheckpointError, UsageError

BEGIN = "<!-- dsv3-tools: generated, changes here are lost -->"
END = "<!-- dsv3-tools: end -->"

SOURCE_CARD = """---
license: other  # with a name
license_name: deepseek
license_link: LICENSE-MODEL
pipeline_tag: text-generation
language: [en, zh]
tags: [not, taken]
---
# The source's own words
"""

OPERATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16": ("convert_fp8_to_bf16", {"max_shard_size": 200_000}),
    "fp8": ("convert_bf16_to_fp8", {"scale_fmt": "ue8m0"}),
    "fp8-like": ("convert_bf16_to_fp8", {}),
    "int8-channel": ("quantize_int8", {"exclude": ["model.layers.0.*", "*.layers.1.self_attn.[o|`]_proj"]}),
    "int8-block": ("quantize_int8", {"scheme": "block", "mtp": "drop"}),
    "int4": ("quantize_int4", {"group_size": 32, "mtp": "keep"}),
    "int4-asymmetric": ("quantize_int4", {"group_size": 32, "symmetric": False, "scale_search": "absmax"}),
    "int4-gptq": ("quantize_int4", {"group_size": 32, "layout": "gptq"}),
    "int4-awq": ("quantize_int4", {"group_size": 32, "layout": "awq"}),
    "int4-fp8": ("quantize_int4", {"group_size": 32, "rest": "fp8"}),
    "int8-to-bf16": ("convert_int8_to_bf16", {}),
    "int4-to-bf16": ("convert_int4_to_bf16", {}),
    "main": ("split_mtp", {}),
    "mtp": ("split_mtp", {}),
    "nextn": ("split_mtp", {"layout": "sglang-nextn"}),
    "whole": ("merge_mtp", {}),
    "ranks": ("convert_to_deepseek_infer", {"model_parallel": 2}),
}
SOURCES = {
    "int8-to-bf16": "int8-channel",
    "int4-to-bf16": "int4",
    "fp8": "bf16",
    "fp8-like": "bf16",
    "ranks": "bf16",
}
HALVES = {"main": "main", "mtp": "mtp", "nextn": "mtp"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tools) -> Path:
    folder = tmp_path_factory.mktemp("cards") / "source"
    whole_blocks = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128}
    tools.make(folder, layers=5, overrides=whole_blocks | {"num_nextn_predict_layers": 1})
    (folder / "README.md").write_text(SOURCE_CARD)
    return folder


@pytest.fixture(scope="module")
def make(source: Path, tools) -> Callable[[str, Path], None]:
    def run(name: str, folder: Path) -> None:
        function, options = OPERATIONS[name]
        options = {"device": "cpu", "workers": 1, **options}
        own = source if name not in SOURCES else source.parent / SOURCES[name]
        place: tuple[Path, ...] = (own, folder)
        if name in HALVES:
            place, options = (own,), {HALVES[name]: folder, **options}
        if name == "whole":
            place = (source.parent / "main", source.parent / "mtp", folder)
        if name == "fp8-like":
            options["like"] = source
        with tools.interposed(tools.unsynced, ("fsync",)):
            getattr(dsv3_tools, function)(*place, **options)

    return run


@pytest.fixture(scope="module")
def results(source: Path, make) -> dict[str, Path]:
    for name in OPERATIONS:
        make(name, source.parent / name)
    return {name: source.parent / name for name in OPERATIONS}


@pytest.fixture(params=OPERATIONS)
def result(request: pytest.FixtureRequest, results: dict[str, Path]) -> Path:
    return results[request.param]


@pytest.fixture
def mine(results: dict[str, Path], tmp_path: Path) -> Path:
    """A result that the test may change."""
    return Path(shutil.copytree(results["bf16"], tmp_path / "mine"))


def text_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


def front_matter(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text_of(folder).split("---\n")[1])
    return found


def test_every_result_has_a_card_that_the_hubs_tools_read(result: Path) -> None:
    loaded = ModelCard.load(result / "README.md")
    said = loaded.data.to_dict()
    assert said["license"] == "other"
    assert said["license_name"] == "deepseek"
    assert said["language"] == ["en", "zh"]
    assert said["quantized_by"] == f"dsv3-tools {dsv3_tools.__version__}"
    assert {"dsv3-tools", "deepseek_v3"} <= set(said["tags"])
    assert "taken" not in said["tags"]
    assert "own words" not in text_of(result)
    again = ModelCard(str(loaded))
    assert again.data.to_dict() == said
    assert yaml.safe_load(yaml.safe_dump(front_matter(result))) == front_matter(result)


def test_a_card_made_later_is_the_same(result: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(result, tmp_path / "copy"))
    assert not card(copy).written
    (copy / "README.md").unlink()
    assert card(copy).written
    assert text_of(copy) == text_of(result)


def test_equal_runs_give_equal_cards(results, make, tmp_path: Path) -> None:
    for name in ("bf16", "nextn", "ranks"):
        make(name, tmp_path / f"another-{name}")
        assert text_of(tmp_path / f"another-{name}") == text_of(results[name])
    make("int4", tmp_path / "control")
    assert text_of(tmp_path / "control") != text_of(results["int4-asymmetric"])


def test_no_time_host_or_path_is_in_it(result: Path, source: Path) -> None:
    text = text_of(result)
    assert str(source.parent) not in text
    assert read_manifest(result)["plan_digest"] in text
    assert json.loads((result / "dsv3_manifest.json").read_bytes())["manifest_sha256"] in text


@pytest.mark.parametrize(
    ("name", "tags", "title"),
    [
        ("bf16", {"bf16", "mtp"}, "BF16"),
        ("fp8", {"fp8", "mtp"}, "FP8 blocks"),
        ("int8-channel", {"int8", "w8a8", "compressed-tensors", "mtp"}, "INT8 channels"),
        ("int8-block", {"int8", "w8a8"}, "INT8 blocks"),
        ("int4", {"int4", "w4a16", "compressed-tensors", "mtp"}, "INT4"),
        ("int4-gptq", {"int4", "w4a16", "gptq", "mtp"}, "INT4 GPTQ"),
        ("int4-awq", {"int4", "w4a16", "awq", "mtp"}, "INT4 AWQ"),
        ("int4-fp8", {"int4", "w4a16", "fp8", "compressed-tensors", "mtp"}, "FP8 blocks"),
        ("main", {"fp8"}, "FP8 blocks"),
        ("mtp", {"fp8", "mtp"}, "MTP module"),
        ("nextn", {"fp8", "mtp", "nextn"}, "NextN"),
        ("whole", {"fp8", "mtp"}, "FP8 blocks"),
        ("ranks", {"deepseek-infer"}, "rank shards"),
    ],
)
def test_tags_and_title_are_of_the_result(results, name: str, tags: set[str], title: str) -> None:
    found = front_matter(results[name])
    assert set(found["tags"]) == tags | {"dsv3-tools", "deepseek_v3"}
    assert title in next(line for line in text_of(results[name]).splitlines() if line.startswith("# "))
    assert ("library_name" in found) == (name not in ("nextn", "ranks"))


def resolved(words: list[str]) -> tuple[click.Command, dict[str, Any]]:
    found: click.Command = app.dsv3
    while isinstance(found, click.Group):
        found = found.commands[words.pop(0)]
    found = found.load()  # type: ignore[attr-defined]
    context = found.make_context(found.name, words)
    return found, context.params


def test_the_command_in_a_card_makes_it(
    results, result: Path, source: Path, tmp_path: Path, monkeypatch
) -> None:
    line = re.search(r"```sh\n(dsv3 .*)\n```", text_of(result))
    assert line is not None
    own = source if result.name not in SOURCES else source.parent / SOURCES[result.name]
    own = results["main"] if result.name == "whole" else own
    places = {"SOURCE": own, "DIR": tmp_path / "out", "MTP": results["mtp"], "ORIGINAL_FP8": source}
    words = [str(places.get(word, word)) for word in shlex.split(line[1])]
    assert words.pop(0) == "dsv3"
    resolved(list(words))
    assert app.run_command_line([*words, "--device", "cpu"]) == 0
    made, expected = read_manifest(tmp_path / "out"), read_manifest(result)
    assert (made["operation"], made["options"]) == (expected["operation"], expected["options"])
    assert made["plan_digest"] == expected["plan_digest"]


def test_control_another_command_makes_another_plan(results, source: Path, tmp_path: Path) -> None:
    words = ["quantize", "int4", str(source), str(tmp_path / "out"), "--group-size", "32", "--device", "cpu"]
    assert app.run_command_line(words) == 0
    assert read_manifest(tmp_path / "out")["plan_digest"] != read_manifest(results["int4"])["plan_digest"]


def test_what_changed_is_in_it(results) -> None:
    text = text_of(results["bf16"])
    assert "| routed experts | fp8_block | bf16 |" in text
    assert "| MTP: routed experts | fp8_block | bf16 |" in text
    assert "The router's correction bias stays in float32." in text
    assert "The MTP module is part of it." in text
    assert "were removed: `quantization_config`" in text
    text = text_of(results["int8-block"])
    assert "The MTP module is not part of it." in text
    assert "Left out: " in text
    assert "blocks have the scale of the original" in text_of(results["fp8-like"])


def test_the_table_adds_up(result: Path) -> None:
    manifest = read_manifest(result)
    payload = sum(change["nbytes_after"] for change in manifest["changes"])
    shards = {n: f["nbytes"] for n, f in manifest["files"].items() if n.endswith(".safetensors")}
    headers = 0
    for name in shards:
        with (result / name).open("rb") as file:
            headers += 8 + int.from_bytes(file.read(8), "little")
    assert payload == sum(shards.values()) - headers


def test_engines_that_load_it_have_a_command_and_others_a_reason(results, source: Path) -> None:
    for name in ("bf16", "int8-channel", "main", "nextn", "mtp"):
        text = text_of(results[name])
        for engine, verdict in dsv3_tools.check(results[name]).verdicts.items():
            title = ENGINES[engine].title
            assert (f"**{title}**" in text) == verdict.loads, (name, engine)
            assert (f"- {title}: " in text) == (not verdict.loads), (name, engine)
    assert "--quantization w8a8_int8" in text_of(results["int8-channel"])
    assert "--quantization" not in text_of(results["bf16"])
    assert '"method": "mtp"' in text_of(results["bf16"])
    assert '"method": "mtp"' not in text_of(results["main"])
    assert "--speculative-draft-model-path DIR" in text_of(results["nextn"])


def test_integrity_does_not_ask_about_a_card(mine: Path) -> None:
    assert dsv3_tools.verify_integrity(mine).passed
    (mine / "README.md").write_text("# mine now\n")
    assert dsv3_tools.verify_integrity(mine).passed
    (mine / "config.json").write_text("{}")
    assert not dsv3_tools.verify_integrity(mine).passed


def test_what_a_user_wrote_stays(mine: Path) -> None:
    text = text_of(mine).replace(
        "license: other\n", "# why\nlicense: mit\nmy_key: 1.10 # as it is\nlanguages: no\n"
    )
    text = text.replace(BEGIN, f"# My words\n\n{BEGIN}").replace("## Files", "## Edited") + "\nThe end.\n"
    (mine / "README.md").write_text(text)
    assert card(mine).written
    found = text_of(mine)
    assert "# why\nlicense: mit\nmy_key: 1.10 # as it is\nlanguages: no\n" in found
    assert f"# My words\n\n{BEGIN}" in found
    assert found.endswith(f"{END}\n\nThe end.\n")
    assert "## Edited" not in found
    assert not card(mine).written


def test_tags_that_a_user_added_or_removed(mine: Path) -> None:
    text = text_of(mine).replace("- mtp\n", "- mine\n")
    text = text.replace("pipeline_tag: text-generation\n", "", 1)
    (mine / "README.md").write_text(text)
    card(mine)
    found = front_matter(mine)
    assert found["tags"] == ["dsv3-tools", "deepseek_v3", "bf16", "mine"]
    assert "pipeline_tag" not in found


def test_a_generated_value_follows_the_result(source: Path, make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make("int8-block", out)
    text = text_of(out).replace("tags:\n", "tags:\n- mine\n", 1) + "Mine.\n"
    (out / "README.md").write_text(text)
    (out / "dsv3_figures.json").write_text("{}")
    dsv3_tools.quantize_int4(source, out, group_size=32, device="cpu", overwrite=True)
    assert {"int4", "mine"} <= set(front_matter(out)["tags"])
    assert "int8" not in front_matter(out)["tags"]
    assert text_of(out).endswith("Mine.\n")
    assert not (out / "dsv3_figures.json").exists()


def test_what_was_overwritten_leaves_no_trace(results, make, source: Path, tmp_path: Path) -> None:
    make("ranks", tmp_path / "out")
    options: dict[str, Any] = {"max_shard_size": 200_000, "overwrite": True, "device": "cpu"}
    dsv3_tools.convert_fp8_to_bf16(source, tmp_path / "out", **options)
    assert text_of(tmp_path / "out") == text_of(results["bf16"])


def test_a_readme_without_marks_keeps_its_text(mine: Path) -> None:
    own = "---\nlicense: apache-2.0\n---\n# My model\n\nWords.\n"
    (mine / "README.md").write_text(own)
    card(mine)
    assert text_of(mine).startswith("---\nlicense: apache-2.0\n")
    assert f"---\n# My model\n\nWords.\n\n{BEGIN}\n" in text_of(mine)
    assert front_matter(mine)["license"] == "apache-2.0"
    assert ModelCard(text_of(mine)).data.license == "apache-2.0"
    before = text_of(mine)
    assert not card(mine).written
    assert text_of(mine) == before


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("---\na: [1\n---\n", "is not YAML"),
        ("---\n- a\n---\n", "list of keys"),
        ("---\n{a: 1}\n---\n", "list of keys"),
        ("---\n1: a\n---\n", "list of keys"),
        ("---\na: 1\na: 2\n---\n", "a key twice"),
        ("---\n  a: 1\n---\n", "beginning of a line"),
        ("---\na: &x [*x]\n---\n", "has an alias"),
        ("---\nb: !!python/none 1\n---\n", "is not YAML"),
        ("---\nd: 2024-13-45\n---\n", "is not YAML"),
        ("---\na: " + "[" * 5000 + "\n---\n", "is not YAML"),
        (f"words\n{BEGIN}\n", "expected one of each"),
        (f"{END}\n{BEGIN}\n", "expected one of each"),
        (f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n", "expected one of each"),
        (b"\xff\xfe", "not UTF-8"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_what_cannot_be_kept_is_refused_and_left_alone(
    mine: Path, make, tmp_path: Path, text: str | bytes, reason: str
) -> None:
    data = text if isinstance(text, bytes) else text.encode()
    (mine / "README.md").write_bytes(data)
    with pytest.raises(CheckpointError, match=reason) as caught:
        card(mine)
    assert str(mine / "README.md") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (mine / "README.md").read_bytes() == data


def test_a_run_leaves_alone_what_it_cannot_keep(source: Path, make, tmp_path: Path) -> None:
    make("bf16", tmp_path / "out")
    assert card_problem(tmp_path / "out") is None
    (tmp_path / "out" / "README.md").write_text("---\na: [1\n---\n")
    dsv3_tools.quantize_int4(source, tmp_path / "out", group_size=32, device="cpu", overwrite=True)
    assert text_of(tmp_path / "out") == "---\na: [1\n---\n"
    assert "README.md: its front matter is not YAML" in str(card_problem(tmp_path / "out"))
    assert dsv3_tools.verify_integrity(tmp_path / "out").passed


def test_a_directory_with_only_a_readme_is_not_empty(make, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine\n")
    with pytest.raises(dsv3_tools.Dsv3Error, match=r"is not empty \(README.md\)"):
        make("bf16", tmp_path / "out")
    assert text_of(tmp_path / "out") == "mine\n"


def test_a_directory_that_is_no_result(source: Path, tmp_path: Path) -> None:
    for folder in (source, tmp_path / "none"):
        with pytest.raises(CheckpointError, match=r"has no dsv3_manifest\.json"):
            card(folder)
    (tmp_path / "dsv3_manifest.json").write_bytes(encode_manifest({"files": {}}))
    with pytest.raises(CheckpointError):
        card(tmp_path)


def test_a_manifest_without_what_a_card_needs(mine: Path) -> None:
    manifest = read_manifest(mine)
    for key in ("operation", "program", "options"):
        (mine / "dsv3_manifest.json").write_bytes(
            encode_manifest({k: v for k, v in manifest.items() if k != key})
        )
        with pytest.raises(CheckpointError, match="lacks what a card is made of"):
            card(mine)
    (mine / "dsv3_manifest.json").write_bytes(
        encode_manifest({k: v for k, v in manifest.items() if k != "changes"})
    )
    card(mine)


def test_base_models(mine: Path, results) -> None:
    commit = "0123456789" * 4
    manifest = read_manifest(mine)
    manifest["repositories"] = {"source": {"repo": "a-b/C.d", "revision": "main", "commit": commit}}
    (mine / "dsv3_manifest.json").write_bytes(encode_manifest(manifest))
    card(mine)
    found = front_matter(mine)
    assert (found["base_model"], found["base_model_relation"]) == ("a-b/C.d", "quantized")
    assert f"dsv3 convert fp8-to-bf16 hf://a-b/C.d@{commit} DIR" in text_of(mine)
    assert "# C.d: BF16" in text_of(mine)
    assert f"[a-b/C.d](https://huggingface.co/a-b/C.d), commit `{commit}`" in text_of(mine)
    assert "base_model" not in front_matter(results["bf16"])


def test_base_model_of_a_cache_folder(source: Path, make, tmp_path: Path) -> None:
    folder = tmp_path / "models--deepseek-ai--DeepSeek-V3.1" / "snapshots" / "abc"
    shutil.copytree(source, folder)
    dsv3_tools.convert_fp8_to_bf16(folder, tmp_path / "bf16", device="cpu")
    assert front_matter(tmp_path / "bf16")["base_model"] == "deepseek-ai/DeepSeek-V3.1"
    dsv3_tools.split_mtp(tmp_path / "bf16", main=tmp_path / "main", device="cpu")
    found = front_matter(tmp_path / "main")
    assert found["base_model"] == "deepseek-ai/DeepSeek-V3.1"
    assert "base_model_relation" not in found
    assert parse_manifest((tmp_path / "bf16" / "dsv3_manifest.json").read_bytes(), "")["source_card"][
        "license"
    ]


def test_names_are_shown_as_they_are() -> None:
    assert escape("[red]a|b`c\x1b[0m*x*") == r"\[red\]a\|b\`c\\x1b\[0m\*x\*"
    assert escape("q_a_proj _x_") == r"q_a_proj \_x\_"
    assert code("a") == "`a`"
    assert code("a|b") == r"a\|b"
    assert code("a`b") == r"a\`b"
    assert fenced(["```"], "sh") == ["````sh", "```", "````"]
    assert shell(["a b", "c\nd'"]) == "'a b' $'c\\nd\\''"
    assert shlex.split(shell(["it's", "a|b"])) == ["it's", "a|b"]


def test_comments_belong_to_the_key_that_follows() -> None:
    text = "---\n# first\na: 1\n\n# of b\nb: |\n  x\n\n  # inside\nc: 2\n# last\n---\nbody\n"
    found = parse_card(text.encode(), "here")
    assert "".join(found.lines.values()) + found.tail == text.split("---\n")[1]
    assert found.lines["a"] == "# first\na: 1\n"
    assert found.lines["b"].startswith("\n# of b\nb: |\n")
    assert found.tail == "# last\n"
    renewed = found.renewed({"c": "new"}, "made\n")
    assert "a: 1\n\n# of b\nb: |\n  x\n\n  # inside\nc: 2\n# last\n---\n" in renewed


class TestFigures:
    @staticmethod
    def report(kind: str, place: Path, **changes: Any) -> dict[str, Any]:
        if kind == "tensors":
            formats = [
                {
                    "reference": "fp8_block",
                    "candidate": "bf16",
                    "num_weights": 3,
                    "num_elements": 9,
                    "exact": 1.0,
                    "least_snr": None,
                    "median_snr": None,
                    "failed": 0,
                }
            ]
            document = {"candidate": str(place), "num_compared": 3, "num_parameters": 3, "formats": formats}
        elif kind == "logits":
            run = {"kl": 0.01, "top1": 0.9, "perplexity": None}
            document = {"candidate": str(place), "tokens": "text, 2 x 8", "dtype": "F32", "perplexity": 2.5}
            document |= {"runs": {"replayed": run, "free": run}}
        else:
            draft = {"number": 1, "acceptance": 0.65}
            document = {"directory": str(place), "module": str(place), "tokens": "text", "dtype": "F32"}
            document |= {"drafts": [draft], "expected_tokens": [1.65]}
        return document | {"passed": True} | changes

    def write(self, path: Path, document: Any) -> Path:
        path.write_text(json.dumps(document))
        return path

    def test_they_are_shown_and_kept(self, mine: Path, tmp_path: Path) -> None:
        files = [
            self.write(tmp_path / f"{kind}.json", self.report(kind, mine))
            for kind in ("tensors", "logits", "mtp")
        ]
        assert card(mine, figures=files).figures == ("tensors", "logits", "mtp")
        text = text_of(mine)
        assert "| verify tensors | fp8_block to bf16 | 3 weights, 100 % of the elements as expected |" in text
        assert "| verify logits | top-1 agreement, same experts | 90.00% |" in text
        assert "| verify logits | perplexity, same experts | not finite |" in text
        assert "| verify mtp | draft 1 accepted | 65.00%, 1.650 tokens a step |" in text
        (mine / "README.md").unlink()
        card(mine)
        assert text_of(mine) == text
        assert str(tmp_path) not in (mine / "dsv3_figures.json").read_text()
        worse = self.report("tensors", mine, passed=False)
        card(mine, figures=[self.write(tmp_path / "worse.json", worse)])
        assert "| verify tensors | passed | no |" in text_of(mine)

    def test_they_do_not_travel_with_a_conversion(self, mine: Path, tmp_path: Path) -> None:
        card(mine, figures=[self.write(tmp_path / "a.json", self.report("tensors", mine))])
        dsv3_tools.convert_bf16_to_fp8(mine, tmp_path / "fp8", device="cpu")
        assert not (tmp_path / "fp8" / "dsv3_figures.json").exists()
        assert "## Figures" not in text_of(tmp_path / "fp8")

    def test_those_of_another_result_are_left_out(self, mine: Path, tmp_path: Path) -> None:
        card(mine, figures=[self.write(tmp_path / "a.json", self.report("tensors", mine))])
        assert "## Figures" in text_of(mine)
        manifest = read_manifest(mine) | {"blocks_kept": 7}
        (mine / "dsv3_manifest.json").write_bytes(encode_manifest(manifest))
        card(mine)
        assert "## Figures" not in text_of(mine)

    @pytest.mark.parametrize("kind", ["tensors", "logits", "mtp"])
    def test_what_is_about_another_directory_is_refused(
        self, mine: Path, results, tmp_path, kind: str
    ) -> None:
        before = text_of(mine)
        for place in (results["int4"], tmp_path / "gone"):
            path = self.write(tmp_path / "a.json", self.report(kind, place))
            with pytest.raises(UsageError, match=r"is about .*, expected"):
                card(mine, figures=[path])
        assert text_of(mine) == before
        assert not (mine / "dsv3_figures.json").exists()
        for place in (results["bf16"], tmp_path / "elsewhere" / mine.name):  # its original; one with its name
            card(mine, figures=[self.write(tmp_path / "a.json", self.report(kind, place))])

    @pytest.mark.parametrize(
        "document",
        [
            [],
            {},
            {"error": {"kind": "X"}, "exit_code": 3},
            {"passed": True, "num_compared": 1},
            {"passed": True, "num_compared": "x", "num_parameters": 1, "candidate": "mine", "formats": []},
            {"passed": True, "runs": [], "candidate": "mine"},
            {"passed": True, "drafts": 1, "module": "mine", "directory": "mine"},
            {"passed": True, "num_compared": 1, "candidate": 5},
        ],
        ids=str,
    )
    def test_what_is_no_report_is_refused(self, mine: Path, tmp_path: Path, document: Any) -> None:
        with pytest.raises(CheckpointError) as caught:
            card(mine, figures=[self.write(tmp_path / "a.json", document)])
        assert str(tmp_path / "a.json") in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_files_that_cannot_be_read(self, mine: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="cannot be read"):
            card(mine, figures=[tmp_path / "none.json"])
        (mine / "dsv3_figures.json").write_text('{"figures": 1}')
        with pytest.raises(CheckpointError, match="not figures of dsv3-tools"):
            card(mine)
