import json

import pytest
from omegaconf import OmegaConf

from dinov2_eq.config.load import load_config
from dinov2_eq.tools import collect_results

BORDERS = {
    "rotation": ("zeros", "masked", "canvas"),
    "translation": ("zeros", "masked", "canvas"),
    "color_jitter": ("none", "masked"),
    "blur": ("none", "masked"),
}


def write_run(folder, *overrides, ks=(10, 20), random_init=False, **protocol):
    """A run folder as training and both probes leave it; `protocol` is what the probes say about themselves."""
    folder.mkdir()
    data = "CIFAR10:split=TRAIN:root=/somewhere/cifar10"
    OmegaConf.save(load_config("debug", [f"train.dataset_path={data}", *overrides]), folder / "config.yaml")
    (folder / "environment.json").write_text(json.dumps({"device": "cpu, 1 threads", "commit": "abc"}))
    (folder / "training_metrics.jsonl").write_text('{"step": 1, "images_per_second": 50}\n')
    encoders = {"trained": 0.75, "random-init": 0.25} if random_init else {"trained": 0.75}
    rows = [
        {"encoder": name, "tokens": "both", "task": task, "border": border}
        | {"r2_pooled": r2, "r2_mean": r2, "r2_components": {"p": r2}}
        for name, r2 in encoders.items()
        for task, borders in BORDERS.items()
        for border in borders
    ]
    means = [
        {"encoder": name, "name": mean, "r2_pooled": r2}
        for name, r2 in encoders.items()
        for mean in collect_results.MEANS
    ]
    common = {"train_dataset": data, "val_dataset": data, "seconds": 1.5, "random_init": random_init}
    common |= {"num_val_images": 100, **protocol}
    head = {"protocol": common, "encoder": {"step": 10}}
    accuracies = {"full": {str(k): {"top1": 30 + k} for k in ks}}
    (folder / "results_eval_knn.json").write_text(json.dumps({**head, "results": accuracies}))
    (folder / "results_eval_equivariance.json").write_text(json.dumps({**head, "rows": rows, "summary": means}))
    return str(folder)


def collect(tmp_path, runs, *flags):
    output = tmp_path / "results/all.json"
    collect_results.main([*runs, "--output", str(output), *flags])
    return json.loads(output.read_text()), output.with_suffix(".md").read_text()


def test_rows_say_what_was_run(tmp_path):
    runs = [
        write_run(tmp_path / "base", "equivariance.enabled=false", random_init=True, seconds=3),
        write_run(tmp_path / "control", "equivariance.loss_weight=0", random_init=True),
        write_run(tmp_path / "task", "train.seed=7", "train.accumulation_steps=2", ks=(5, 20)),
    ]
    results, table = collect(tmp_path, runs)
    random, base, control, task = results["rows"]
    assert [row["kind"] for row in results["rows"]] == ["untrained", "base method", "control, λ = 0", "task"]
    assert "transform" not in base and control["loss_weight"] == 0 and task["loss_weight"] > 0
    config = load_config("debug")
    assert task["batch_size"] == 2 * config.train.batch_size_per_gpu and task["images_seen"] == 10 * task["batch_size"]
    assert (control["view"], control["invariant_projection"]) == ("third", False)
    assert (task["seed"], task["steps"], task["device"], task["commit"]) == (7, 10, "cpu, 1 threads", "abc")
    assert (task["arch"], task["patch_size"]) == (config.student.arch, config.student.patch_size)
    assert task["data"] == results["knn_protocol"]["val_dataset"] == "CIFAR10:split=TRAIN:root=cifar10"
    assert task["images_per_second"] == 50 and task["knn_top1"] == {"5": 35, "20": 50}
    assert random["r2"]["rotation/canvas"]["pooled"] == 0.25 and random["depth"] == base["depth"]
    assert "/somewhere" not in json.dumps(results) and "seconds" not in results["equivariance_protocol"]

    header, _, *lines = table.splitlines()
    assert header.endswith("20-NN % |")
    assert lines[0] == "| random init | untrained |" + " 0.25 / 0.25 / 0.25 |" * 2 + " 0.25 / 0.25 |" * 2 + (
        " 0.250 | 0.250 |  |"
    )
    assert lines[2].startswith("| control | control, λ = 0 | 0.75") and lines[3].endswith(" 50.0 |")


def test_quarters(tmp_path):
    """R2 from the quarters, where it was measured: the border-free ones of the trained encoder, and their mean."""
    run = write_run(tmp_path / "a")
    path = tmp_path / "a/results_eval_equivariance.json"
    results = json.loads(path.read_text())
    scores = dict(zip(BORDERS, (0.9, 0.8, 0.7, 0.4), strict=True))
    variants = [
        {"encoder": encoder, "tokens": tokens, "task": task, "border": border, "r2_mean": 0, "r2_components": {}}
        | {"r2_pooled": r2 if (encoder, tokens, border in ("canvas", "none")) == ("trained", "grid2", True) else -1}
        for encoder in ("random-init", "trained")
        for tokens in ("cls", "grid2")
        for task, r2 in scores.items()
        for border in BORDERS[task]
    ]
    path.write_text(json.dumps({**results, "variants": {"rows": variants, "summary": []}}))
    row, other = collect(tmp_path, [run, write_run(tmp_path / "b")])[0]["rows"]
    assert row["r2_quarters"] == {"by_task": scores, "mean": pytest.approx(0.7)} and "r2_quarters" not in other
    assert row["r2"]["rotation/canvas"]["pooled"] == 0.75


def test_a_run_of_a_sweep(tmp_path):
    """Its results are in a folder for each evaluation."""
    expected = collect(tmp_path, [write_run(tmp_path / "a")])
    for probe in ("knn", "equivariance"):
        (tmp_path / "a" / probe).mkdir()
        (tmp_path / f"a/results_eval_{probe}.json").rename(tmp_path / f"a/{probe}/results_eval_{probe}.json")
    assert collect(tmp_path, [str(tmp_path / "a")]) == expected


def test_runs_are_added_to_an_earlier_collection(tmp_path):
    first = [write_run(tmp_path / "base", "equivariance.enabled=false", random_init=True)]
    second = [write_run(tmp_path / "task", random_init=True)]
    expected = collect(tmp_path, [*first, *second])
    collect(tmp_path, first)
    assert collect(tmp_path, [str(tmp_path / "results/all.json"), *second]) == expected
    with pytest.raises(
        ValueError, match=r"knn results of .*/other cannot be compared with those of .*/all.json: epochs"
    ):
        collect(tmp_path, [str(tmp_path / "results/all.json"), write_run(tmp_path / "other", epochs=50)])


def test_the_plot_has_a_point_for_each_run(tmp_path):
    runs = [
        write_run(tmp_path / "plain_7", "equivariance.enabled=false", random_init=True),
        write_run(tmp_path / "task_7"),
    ]
    collect(tmp_path, runs)
    plot = (tmp_path / "results/all.svg").read_text()
    assert plot.count("plain_7") == plot.count("task_7") == 1 and "random init" not in plot


ROW = {"run": "a", "kind": "task", "r2": {}, "r2_means": {}, "knn_top1": {"20": 50.0}}


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"rows": []},
        {"rows": {}},
        *({"rows": [row]} for row in ({}, ROW | {"r2": {"rotation/canvas": 0.5}}, ROW | {"knn_top1": {"ten": 1.0}})),
    ],
)
def test_a_damaged_collection_is_named(tmp_path, content):
    if content and content["rows"] != []:
        content |= {"knn_protocol": {}, "equivariance_protocol": {}}
    (tmp_path / "earlier.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"earlier\.json"):
        collect(tmp_path, [str(tmp_path / "earlier.json")])


def test_a_run_counts_once(tmp_path):
    """However often it is given; another run of its name is an error."""
    run = write_run(tmp_path / "a", random_init=True)
    expected, earlier = collect(tmp_path, [run]), str(tmp_path / "results/all.json")
    assert collect(tmp_path, [earlier, run]) == collect(tmp_path, [run, run]) == expected
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="two different runs of the name a: give each once"):
        collect(tmp_path, [run, write_run(tmp_path / "other/a", "train.seed=3", random_init=True)])


def test_a_collection_without_accuracies(tmp_path):
    (tmp_path / "empty.json").write_text('{"knn_protocol": {}, "equivariance_protocol": {}, "rows": []}')
    with pytest.raises(ValueError, match="no run with a k-NN accuracy"):
        collect(tmp_path, [str(tmp_path / "empty.json")])


def test_neighbours_of_the_table(tmp_path):
    runs = [write_run(tmp_path / "a", ks=(10, 20, 100)), write_run(tmp_path / "b", ks=(10, 20))]
    assert "10-NN %" in collect(tmp_path, runs, "--k", "10")[1]
    with pytest.raises(ValueError, match=r"at k = 100 .*b has \[10, 20\]"):
        collect(tmp_path, runs, "--k", "100")
    with pytest.raises(ValueError, match=r"at one k .*c has \[5\]"):
        collect(tmp_path, [*runs, write_run(tmp_path / "c", ks=(5,))])


def test_probed_otherwise(tmp_path):
    runs = [write_run(tmp_path / "a", epochs=15), write_run(tmp_path / "b", epochs=50)]
    with pytest.raises(
        ValueError, match=r"knn results of .*/b cannot be compared with those of .*/a: epochs is 50, not 15"
    ):
        collect(tmp_path, runs)
    assert not (tmp_path / "results").exists()


def test_not_probed(tmp_path):
    run = write_run(tmp_path / "a")
    (tmp_path / "a/results_eval_knn.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"a has no results_eval_knn\.json"):
        collect(tmp_path, [run])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("environment.json", '{"device"'),
        ("environment.json", "[]"),
        ("environment.json", '{"device": "cpu"}'),
        ("results_eval_knn.json", '{"results": {"full": {}}}'),
        ("results_eval_equivariance.json", '{"protocol": {}, "rows": []}'),
        (
            "results_eval_equivariance.json",
            '{"protocol": {"train_dataset": "a", "val_dataset": "b"}, "rows": [], "encoder": {"step": "x"}}',
        ),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content):
    run = write_run(tmp_path / "a")
    (tmp_path / "a" / name).write_text(content)
    with pytest.raises(ValueError, match=f"^{tmp_path}/a/{name} "):
        collect(tmp_path, [run])
