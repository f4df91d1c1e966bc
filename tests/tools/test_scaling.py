"""The page about scaling shows what the tool computes, and the tool computes what the page's formulas say."""

import json
import re
from pathlib import Path

import pytest

from dinov2_eq.models import ARCHS
from dinov2_eq.tools import scaling

ROOT = Path(__file__).parents[2]
RESULTS = json.loads((ROOT / "docs/results/scaling.json").read_text())
MODELS = {model["name"]: model for model in RESULTS["models"]}


def test_the_page_has_the_tables_of_the_results():
    page = (ROOT / "docs/scaling.md").read_text()
    assert page.split(scaling.BEGIN)[1].split(scaling.END)[0].strip() == scaling.tables(RESULTS)
    assert "Nothing on this page ran on a GPU" in page


@pytest.mark.parametrize("name", ["ViT-L/16, task", "ViT-g/14, task"])
def test_the_results_are_of_this_code(name):
    model, stored = {**scaling.count(name), **scaling.measure_block(name)}, MODELS[name]
    assert model["parameters"] == stored["parameters"] and model["config"] == stored["config"]
    assert model["flops_per_image"] == pytest.approx(stored["flops_per_image"], rel=0.01)
    kept = "kept_bytes_per_token_and_block"
    assert model[kept] == pytest.approx(stored[kept], rel=0.01)
    for row in RESULTS["runs"]:
        if row["model"] == name:
            again = scaling.run(model, row["gpus"], row["global_batch"])
            assert again == {
                **row,
                **{key: pytest.approx(row[key], rel=0.01) for key in row if type(row[key]) is float},
            }


@pytest.mark.parametrize("name", MODELS)
def test_operations_are_about_two_for_each_weight_and_token(name):
    """The backward pass takes twice as many; attention and the patch embedding add a little."""
    model, arch = MODELS[name], {"ViT-L": ARCHS["vit_large"], "ViT-g": ARCHS["vit_giant2"]}[name[:5]]
    per_block = 12 * arch.embed_dim**2
    kept = 0.6 if "g/14" in name else 0.7  # by stochastic depth
    expected = 2 * per_block * arch.depth * model["tokens_per_image"] * kept
    counted = model["flops_per_image"]
    assert expected < counted["student forward"] < 1.1 * expected
    assert counted["student backward"] == pytest.approx(2 * counted["student forward"], rel=0.01)
    assert counted["total"] == pytest.approx(sum(value for part, value in counted.items() if part != "total"), rel=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_the_formula_keeps_what_autograd_keeps(name):
    model = MODELS[name]
    assert model["kept_bytes_by_formula"] == pytest.approx(model["kept_bytes_per_token_and_block"], rel=0.02)


def test_the_largest_batch_fits_and_one_more_does_not():
    [row] = [
        row
        for row in RESULTS["largest_batch"]
        if (row["model"], row["gpus"], row["checkpointing"]) == ("ViT-L/16", 8, False)
    ]
    limit = 0.9 * 80e9 / 1024**3
    fits, too_many = (scaling.memory("ViT-L/16", row["h100"] + more, 8, "grad_op")["total"] for more in (0, 1))
    assert fits <= limit < too_many


def test_what_each_strategy_sends():
    model = MODELS["ViT-L/16"]
    trained, teacher = sum(model["parameters"].values()), model["teacher_parameters"]
    alone = scaling.communication(model, "grad_op", 1)
    assert alone["seconds"] == 0
    sent = {strategy: scaling.communication(model, strategy, 64) for strategy in ("ddp", "grad_op", "full", "hybrid")}
    assert [sent["ddp"][key] for key in ("gathered_bytes", "scattered_bytes")] == [0, 0]
    assert sent["ddp"]["all_reduced_bytes"] == 8 * trained == 8 * sent["hybrid"]["all_reduced_bytes"]
    assert sent["grad_op"]["gathered_bytes"] == 2 * (trained + teacher)
    assert sent["full"]["gathered_bytes"] == sent["hybrid"]["gathered_bytes"] == 2 * (2 * trained + teacher)
    # 64 processes on 8 nodes of 8 adapters: each node passes on all but its own part.
    wire = (2 * (trained + teacher) + 4 * trained) * 63 / 64 / (400e9 * 0.7)
    latency = 3 * model["units"] * 6 * 10e-6
    assert sent["grad_op"]["seconds"] == pytest.approx(wire + latency)
    within_a_node = scaling.communication(model, "grad_op", 8)
    assert within_a_node["seconds"] < sent["grad_op"]["seconds"]


@pytest.mark.parametrize(("sending_s", "step_s", "in_turn_s"), [(7.0, 42.0, 60.0), (5.0, 39.0, 54.0)])
def test_the_time_of_a_step_worked_out_by_hand(monkeypatch, sending_s, step_s, in_turn_s):
    """8 GPUs with 3 forwards of 4 images each, in round figures."""
    figures = {"peak": 16.0, "utilisation": 0.5, "memory_bandwidth": 4.0, "gpus_per_node": 8}
    monkeypatch.setattr(scaling, "ASSUMED", scaling.ASSUMED | figures)
    monkeypatch.setattr(scaling, "choose_split", lambda *_: scaling.Split(4, 3, checkpointing=True))
    monkeypatch.setattr(scaling, "communication", lambda *_: {"seconds": sending_s})
    monkeypatch.setattr(scaling, "memory", lambda *_: {"total": 1.0})
    model = {
        "name": "round",
        "flops_per_image": {"student forward": 2.0, "total": 10.0},
        "parameters": {"backbone": 10, "heads": 6},
        "teacher_parameters": 8,
    }
    row = scaling.run(model, 8, 96)
    # The student's forward is computed twice: 4 images of 12 operations at 8 a second.
    assert row["computing_s"] == 6.0 and row["sending_s"] == sending_s
    # A shard of 2 trained and 1 teacher parameters: 9 * 2 + 3 * 1 values of 4 bytes, at 4 bytes a second.
    assert row["update_s"] == 21.0
    assert row["images_per_second"] == 96 / step_s and row["images_per_second_in_turn"] == 96 / in_turn_s
    assert row["steps"] == 125000 * 2048 // 96 and row["hours"] == pytest.approx(row["steps"] * step_s / 3600)


@pytest.mark.parametrize(("gpus", "more_than_fits"), [(8, True), (512, False)])
def test_a_step_takes_the_largest_power_of_two_that_fits(gpus, more_than_fits):
    """Unless all images of a GPU fit in one forward."""
    split = scaling.choose_split("ViT-L/16", gpus, 2048)
    assert split.batch * split.accumulation * gpus == 2048
    limit = 0.9 * 80e9 / 1024**3
    fits, doubled = (scaling.memory("ViT-L/16", split.batch * by, gpus, "grad_op")["total"] for by in (1, 2))
    assert fits <= limit and (doubled > limit if more_than_fits else split.accumulation == 1)


@pytest.mark.parametrize("size", ["global", "local"])
def test_a_third_view_costs_its_tokens(monkeypatch, size):
    """Half of the images have one g(u) of the global size, or u and g(u) of the local size."""
    settings = ["student.drop_path_rate=0", f"equivariance.third_view_size={size}"]
    models = {name: ("vits16_eq", [*settings, f"equivariance.view={name}"]) for name in ("third", "second")}
    monkeypatch.setattr(scaling, "MODELS", models)
    third, second = (scaling.count(name) for name in models)
    more = {"global": 0.5 * (14**2 + 1), "local": 2 * 0.5 * (6**2 + 1)}[size]
    assert third["tokens_per_image"] - second["tokens_per_image"] == pytest.approx(more, abs=1)
    per_token = second["flops_per_image"]["student forward"] / second["tokens_per_image"]
    added = third["flops_per_image"]["student forward"] - second["flops_per_image"]["student forward"]
    assert added == pytest.approx(more * per_token, rel=0.1)  # attention costs more for each token of larger views
    rebuilt = {"global": 0.5, "local": 0.5 * 36 / 196}[size]  # tokens that the decoders read, by those of all images
    decoders = third["flops_per_image"]["decoders"] / second["flops_per_image"]["decoders"]
    assert decoders == pytest.approx(rebuilt, rel=0.15)


def test_the_tool_writes_results_and_page(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "MODELS", {"tiny": ("debug", [])})
    page = tmp_path / "page.md"
    page.write_text(f"before\n{scaling.BEGIN}\nold\n{scaling.END}\nafter\n")
    scaling.main(["--output", str(tmp_path / "scaling.json"), "--document", str(page)])
    results = json.loads((tmp_path / "scaling.json").read_text())
    assert results["measured_on_a_gpu"] == "nothing" and len(results["runs"]) == len(scaling.RUNS)
    text = page.read_text()
    assert (
        text.startswith(f"before\n{scaling.BEGIN}\n") and text.endswith(f"{scaling.END}\nafter\n") and "old" not in text
    )
    assert re.search(r"^\| tiny, 64 \|", text, re.MULTILINE)
