"""What the pages tell the reader to type is run as it is written, or is named here with the reason.

Each page is followed from top to bottom in a folder of its own, which holds what the page takes for granted.
"""

import ast
import contextlib
import importlib
import os
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_eq.config.load import load_config, to_dict
from dinov2_eq.config.schema import Config
from dinov2_eq.models import build_backbone
from dinov2_eq.run.cli import COMMANDS, find_command, main
from dinov2_eq.train.train import do_train
from tests.helpers import in_this_process, stand_in_for_programs, tiny_config

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        ROOT / "tests/slurm/README.md",
    ]
}

SMALL = (
    "student.arch=vit_tiny student.depth=4 crops.global_crops_size=32 crops.local_crops_size=16 "
    "crops.local_crops_number=2 dino.head_n_prototypes=64 dino.head_hidden_dim=32 dino.head_bottleneck_dim=16 "
    "equivariance.patch_dim=96 equivariance.equivariant_dim=32 equivariance.decoder_dim=16 optim.steps=2 "
    "optim.warmup_steps=0 optim.freeze_last_layer_steps=0 teacher.warmup_teacher_temp_steps=0 "
    "train.batch_size_per_gpu=4 train.accumulation_steps=1 train.num_workers=0 evaluation.sample_period_steps=2"
)
VIT_S14 = (
    "student.arch=vit_small student.depth=1 crops.global_crops_size=28 crops.local_crops_size=14 "
    "optim.freeze_backbone_steps=1"
)


class Instead(NamedTuple):
    written: str  # a pattern, anywhere in a command or a piece of code
    run: str
    why: str


# In this order; what one puts in, the next ones see.
INSTEAD = [
    Instead(r"root=/data/", "root=data/", "a folder that a test may make"),
    Instead(r"(dataset(?:_path=|[ ])\w+:root=)\.\.\.", r"\1data/train", "the reader's own"),
    Instead(r"(dataset_path=)\.\.\.", r"\1Folder:root=data/images", "the reader's own"),
    Instead(r"PATH/TO/CHECKOUT", str(ROOT), "the reader's own"),
    Instead(r"(--to timm hf) onnx", r"\1", "half a minute, as in tests/tools/test_export.py"),
    Instead(r"export OUT ", "export runs/mine ", "the reader's own"),
    Instead(r"(gradient_shares.py) (RUN|OUT/\w+)", r"\1 runs/mine --batches 1", "the reader's own"),
    Instead(r"(train (?!.*--(print|dry)).*-file (vit|cont).*)", rf"\1 {SMALL}", "days"),
    Instead(r"(-file continue_vits14.*)", rf"\1 {VIT_S14}", "the architecture of the weights"),
    Instead(r"(-file vit(?!.*dataset_path).*)", r"\1 train.dataset_path=Folder:root=data/images", "ImageNet"),
    Instead(r"(doctor .*)", r"\1 student.arch=vit_tiny train.num_workers=0", "room for checkpoints of a ViT-L"),
    Instead("torchrun --nproc-per-node 8 --no-python ", "", "as tests/reliability/test_launchers.py starts torchrun"),
    Instead(r"--cluster local", "--cluster debug", "it would outlive the test"),
    Instead(r"(submit knn .*)runs/large", r"\1runs/done", "the job above it is queued only"),
    Instead(r"(eval \w+ (?!.*num-workers).*--val-dataset.*)", r"\1 --num-workers 0", "few images"),
    Instead(r"(val-dataset: \"[^\"]*\")", r"\1, num-workers: 0", "few images"),
    Instead(r"(eval linear.*)", r"\1 --epochs 1 --epoch-length 2 --batch-size 4", "12,500 steps"),
    Instead(r"(eval equivariance.*)", r"\1 --epochs 1 --hidden-dim 16", "50 epochs"),
    Instead(r"(--card.*)", r"\1 --num-seeds 1 --tokens cls", "nine times as long"),
    Instead(r"vit_small/16", "vit_tiny/16@32", "224 pixels"),
    Instead(r"results (--submit)", r"jobs \1", "what is done makes no job"),
]


class Listed(NamedTuple):
    written: str  # a pattern, at the start of a command
    where: str  # a test, or a file, that has to do with it
    why: str


SLURM = "tests/slurm/test_slurm.py"
TOOLS = "tests/tools"
NOT_RUN_HERE = [
    Listed("make demo", f"{TOOLS}/test_demo.py::test_both_runs_are_trained_probed_and_shown", "ten minutes"),
    Listed("make( format lint)? test", ".ci/run", "runs this test"),
    Listed(r"pip install -e \.", "Makefile", "the network; `make test` does it"),
    Listed("pip install onnx onnxscript onnxruntime", "setup.py", "the network; `make test` does it"),
    Listed(
        "#!/bin/bash|sbatch",
        f"{SLURM}::test_the_script_of_the_guide_goes_on_after_usr2_and_the_loss_of_a_node",
        "SLURM",
    ),
    Listed("salloc|srun|first=", f"{SLURM}::test_the_interactive_commands_of_the_guide", "SLURM"),
    Listed("scancel", f"{SLURM}::test_signals_with_no_resume_and_a_number_in_the_path", "SLURM"),
    Listed("scontrol", f"{SLURM}::test_two_nodes_go_on_after_requeue_and_time_limit", "SLURM"),
    Listed(r"python -m tests\.slurm\.cluster", "tests/slurm/cluster.py", "a shell to type in"),
    Listed(
        "torchrun --max-restarts",
        "tests/reliability/test_launchers.py::test_torchrun_starts_a_killed_run_again_and_passes_sigterm_on",
        "what torchrun itself runs is left out",
    ),
    Listed(r"tools/cifar10_study\.sh", f"{TOOLS}/test_cifar10_study.py::test_recipes_are_trained_and_probed", "hours"),
    Listed(
        r"python tools/collect_results\.py",
        f"{TOOLS}/test_collect_results.py::test_rows_say_what_was_run",
        "wants the study",
    ),
    Listed(
        r"dinov2-eq eval all .*docs/results",
        "tests/eval/test_all.py::test_one_table_of_all_nothing_twice_and_a_failure_kept_to_itself",
        "an hour, and data that nobody may pass on",
    ),
    Listed(
        r"dinov2-eq (eval|train) .*data/(cifar10|tiny_imagenet)\b.*",
        "tests/eval/test_equivariance.py::test_card_of_a_run_and_of_an_encoder_of_another_size",
        "the same",
    ),
    Listed(
        r"python tools/(curve|release_weights)\.py",
        f"{TOOLS}/test_curve.py::test_numbers_by_step",
        "wants those runs",
    ),
    Listed(
        r"python tools/config_reference\.py",
        f"{TOOLS}/test_config_reference.py::test_the_page_is_what_the_schema_says",
        "writes a page",
    ),
    Listed(
        r"python tools/scaling\.py", f"{TOOLS}/test_scaling.py::test_the_tool_writes_results_and_page", "writes a page"
    ),
]

# Runs that a page takes for granted, beside images and weights.
TAKEN_FOR_GRANTED = {
    "README.md": ["other"],
    "docs/evaluation.md": ["mine"],
    "docs/export.md": ["mine"],
    "docs/method.md": ["mine"],
    "docs/results/cifar10.md": ["mine"],
    "docs/slurm.md": ["done"],
}
FLAGS_OF_OTHERS = {"--batch": "scancel", "--signal": "sbatch", "--max-restarts": "torchrun"}
NO_SETTINGS = {"train.parquet", "train.sh"}  # files
PROGRAM = re.compile(r"(dinov2-eq|python|pip|make|torchrun|sbatch|salloc|srun|scancel|scontrol|tools/\w+\.sh) \S")


class Page:
    """A Markdown page, taken apart."""

    def __init__(self, name: str) -> None:
        self.name, self.path = name, PAGES[name]
        fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
        text = self.path.read_text()
        self.blocks: list[tuple[str, str]] = fence.findall(text)
        self.prose = fence.sub("", text)
        self.spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", self.prose)]

    def steps(self) -> Iterator[tuple[str, str]]:
        """(command, python, yaml or files; text), in the order of the page; commands in running text come last."""
        for language, text in self.blocks:
            if language == "" and text.startswith("runs/"):
                yield "files", text
            elif text.startswith("#!"):
                yield "command", text
            elif language in ("", "bash", "sh"):
                for line in text.replace("\\\n", " ").splitlines():
                    if command := re.sub(r"(^|\s+)#.*", "", line):
                        yield "command", " ".join(command.split())
            else:
                yield language, text
        for span in self.spans:
            if PROGRAM.match(span) and not span.startswith("dinov2-eq"):
                yield "command", span


def replaced(text: str) -> tuple[str, set[Instead]]:
    """What is run for a command or a piece of code, and which replacements it took."""
    used = set()
    for instead in INSTEAD:
        text, count = re.subn(instead.written, instead.run, text)
        used |= {instead} if count else set()
    return text, used


def listed(command: str) -> list[Listed]:
    return [entry for entry in NOT_RUN_HERE if re.match(rf"(?:{entry.written})(?!\w)", command)]


class Reader:
    """Follows a page in the working directory."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def follow(self) -> None:
        for kind, text in self.page.steps():
            if kind == "command":
                self.type(text)
            elif kind == "python":
                self.names: dict = {}
                exec(compile(replaced(text)[0], self.page.name, "exec"), self.names)
            elif kind == "yaml":
                (file,) = set(re.findall(r"--config-file (\S+\.yaml)", self.page.path.read_text()))
                Path(file).write_text(replaced(text)[0])
            else:
                folder, *lines = text.splitlines()
                for file in ", ".join(re.split(r"\s{2,}", line.strip())[0] for line in lines).split(", "):
                    assert list(Path(folder).glob(file.rstrip("/").replace("<step>", "*"))), file

    def type(self, command: str) -> None:
        if listed(command):
            return
        command, _ = replaced(command)
        program, *words = shlex.split(command)
        if program == "dinov2-eq":
            assert in_this_process(words) == 0, command
        else:
            assert program == "python", command
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", words)
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        for output in re.findall(r"--output(?:-dir)? (\S+)", command):
            assert Path(output).exists() or "--dry-run" in words, command


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """Generated images in the layouts that the pages name, weights of DINOv2's names and a finished run."""
    folder = tmp_path_factory.mktemp("template")
    generator = np.random.default_rng(0)
    classes = ("n01440764", "n01443537")  # names that ImageNet's layout has
    places = [f"{name}/{of}" for name in ("train", "imagenet/train", "val", "imagenet/val") for of in classes]
    for place in ["images", "sketches/goldfish", "sketches/tench", *places]:
        (folder / "data" / place).mkdir(parents=True)
        for number in range(4 if "val" in place else 12):
            pixels = generator.integers(0, 256, (40 + number, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "data" / place / f"{number}.JPEG", "JPEG")
    backbone = build_backbone("vit_small", patch_size=14, img_size=518, depth=1, layerscale=1.0)
    torch.save(backbone.state_dict(), folder / "dinov2_vits14_pretrain.pth")
    do_train(tiny_config("student.depth=4", "optim.steps=2"), folder / "run")
    return folder


@pytest.fixture
def reader(template, tmp_path, monkeypatch) -> Callable[[str], Reader]:
    """Follows a page by its name in a fresh folder, on a host whose SLURM takes every job and runs none."""

    def arrive(name: str) -> Reader:
        for source in ("data", "dinov2_vits14_pretrain.pth"):
            (tmp_path / source).symlink_to(template / source)
        for run in TAKEN_FOR_GRANTED.get(name, []):
            shutil.copytree(template / "run", tmp_path / "runs" / run)
        return Reader(Page(name))

    slurm = tmp_path / "slurm"
    slurm.mkdir()
    (slurm / "sbatch").write_text('#!/bin/sh\nbash -n "$1" && echo "$1" >>jobs.txt && echo Submitted batch job 7\n')
    for program in ("scontrol", "sinfo", "sacct"):
        (slurm / program).write_text("#!/bin/sh\nexit 1\n")
    for program in slurm.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(slurm), os.environ["PATH"]]))
    monkeypatch.chdir(tmp_path)

    stand_in_for_programs(monkeypatch, in_this_process)
    monkeypatch.setattr("dinov2_eq.tools.doctor.why_compile_fails", lambda device: "")
    return arrive


def quickstart(reader: Reader) -> None:
    """Again: finished; with optim.steps=20: to 20; one class token."""
    again = "dinov2-eq train --config-file debug --output-dir runs/first"
    assert re.search(rf"^{again}$", reader.page.path.read_text(), re.MULTILINE)
    assert main(again.split()[1:]) == 0
    assert "this run is finished: step 10 of optim.steps=10" in Path("runs/first/logs/log.0.txt").read_text()
    assert main([*again.split()[1:], "optim.steps=20", "evaluation.knn_period_steps=0"]) == 0
    assert Path("runs/first/eval/training_20/teacher_checkpoint.pth").exists()
    assert reader.names["model"](torch.zeros(1, 3, 32, 48)).shape == (1, 192)


def readme(reader: Reader) -> None:
    """The transform of your own trains, from a module that Python finds."""
    (name,) = re.findall(r"`(equivariance\.transform=\S+:\w+)`", reader.page.prose)
    module, _ = name.removeprefix("equivariance.transform=").split(":")
    file = Path(*module.split(".")).with_suffix(".py")
    file.parent.mkdir(parents=True)
    file.write_text(next(text for kind, text in reader.page.steps() if kind == "python"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(os.getcwd())
        reader.type(f"dinov2-eq train --config-file vits16_eq --output-dir runs/transform {name}")


def evaluation(reader: Reader) -> None:
    """The list was evaluated, and made four jobs."""
    for ending in ("md", "csv", "json", "html"):
        assert Path(f"results/summary.{ending}").exists()
    assert "failed" not in Path("results/summary.md").read_text() + Path("jobs/summary.md").read_text()
    assert len(Path("jobs.txt").read_text().splitlines()) == 4
    assert Path("runs/mine/report_card.html").exists()


def export(reader: Reader) -> None:
    """The calls in the table load the exports."""
    for library in ("timm", "transformers"):
        (call,) = (span for span in reader.page.spans if span.startswith(f"{library}."))
        folder = Path("exports", {"transformers": "hf"}.get(library, library)).absolute()
        call = re.sub(r"(?<=[(:])FOLDER", str(folder), call).replace(f"({folder})", f"({str(folder)!r})")
        assert eval(call, {library: importlib.import_module(library)}).state_dict()


CLAIMS = {
    "README.md": readme,
    "docs/quickstart.md": quickstart,
    "docs/evaluation.md": evaluation,
    "docs/export.md": export,
}


@pytest.mark.parametrize("name", [name for name in PAGES if any(Page(name).steps())])
def test_the_page_can_be_followed(name, reader):
    at_page = reader(name)
    at_page.follow()
    CLAIMS.get(name, lambda _: None)(at_page)


@pytest.mark.parametrize("name", PAGES)
def test_everything_is_run_or_listed(name):
    for kind, text in Page(name).steps():
        assert kind in ("command", "python", "yaml", "files"), f"a block of {kind!r}, which nothing runs: {text}"
        if kind == "command":
            assert len(listed(text)) <= 1, f"listed twice: {text}"
            is_run = re.match(r"dinov2-eq |python tools/", replaced(text)[0])
            assert listed(text) or is_run, f"neither run nor listed: {text}"


def test_the_tables_hold_nothing_that_the_pages_do_not():
    steps = [text for name in PAGES for _, text in Page(name).steps()]
    used = set().union(*(replaced(text)[1] for text in steps if not listed(text)))
    assert [instead for instead in INSTEAD if instead not in used] == []
    assert set(NOT_RUN_HERE) == {entry for text in steps for entry in listed(text)}
    assert not (TAKEN_FOR_GRANTED.keys() | CLAIMS.keys()) - PAGES.keys()
    for _, where, _ in NOT_RUN_HERE:
        path, _, test = where.partition("::")
        assert (ROOT / path).is_file(), where
        if test:
            tree = ast.parse((ROOT / path).read_text())
            assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, where


@cache
def flags_of(command: str) -> set[str]:
    """Out of its help; a job of `submit` has those of its program too."""
    with contextlib.redirect_stdout(StringIO()) as output, pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    own = set(re.findall(r"(?<![\w-])--[\w-]+", output.getvalue()))
    programs = [name for name in COMMANDS if name.startswith(("train", "eval "))] if command == "submit" else []
    return own.union(*map(flags_of, programs))


@pytest.mark.parametrize("name", PAGES)
def test_flags_in_running_text_exist(name):
    """Whole commands, and flags on their own."""
    every = set().union(*map(flags_of, COMMANDS)) | FLAGS_OF_OTHERS.keys()
    for span in Page(name).spans:
        if span.startswith("dinov2-eq "):
            command, rest = find_command(span.split()[1:])
            assert {word for word in rest if word.startswith("--")} <= flags_of(command), span
        elif span.startswith("--"):
            assert re.match(r"--[\w-]+", span)[0] in every, span


@cache
def settings() -> set[str]:
    return {f"{section}.{key}" for section, values in to_dict(Config()).items() for key in values}


@cache
def accepted(override: str) -> bool:
    return bool(load_config("debug", [override]))


@pytest.mark.parametrize("name", PAGES)
def test_settings_in_running_text_exist(name):
    sections = {key.partition(".")[0] for key in settings()}
    for span in Page(name).spans:
        found = re.fullmatch(r"(([a-z]+)\.\w+)(=\S+)?=?", span)
        if found and found[2] in sections and span not in NO_SETTINGS:
            assert found[1] in settings(), span
            assert not found[3] or accepted(span)


def test_the_readme_names_every_recipe():
    named = re.search(r"packaged recipe \((.*?)\)", PAGES["README.md"].read_text(), re.DOTALL)[1]
    folder = ROOT / "configs/train"
    recipes = {str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml")}
    for name in re.findall(r"`(\S+)`", named):
        found = {recipe for recipe in recipes if re.fullmatch(name.replace("...", ".*"), recipe)}
        assert found, name
        recipes -= found
    assert not recipes


@pytest.mark.parametrize("name", PAGES)
def test_links_and_paths_lead_somewhere(name):
    page = Page(name)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([\w-]*)\)", page.prose):
        if "://" not in target:
            path = page.path.parent / target if target else page.path
            assert path.exists(), target
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE) if anchor else []
            slugs = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
            assert not anchor or anchor in slugs, f"{target}#{anchor}"
    for span in page.spans:
        is_path = re.fullmatch(r"(\w[\w.-]*/)+([\w-]+\.\w+)?|\w+\.py", span)
        if is_path and not span.startswith(("runs/", "demo/", "cifar10/")):
            assert any((root / span).exists() for root in (ROOT, ROOT / "dinov2_eq", page.path.parent)), span
