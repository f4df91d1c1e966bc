"""Runs the commands of the documentation exactly as written.

Each page is followed from top to bottom in its own folder, which contains what the pages assume. A block that cannot
run here has a comment on the line above it, which Markdown does not show, with the reason and maybe the test that
replaces it: `<!-- not run: days on a GPU; see tests/train/test_train.py -->`. Its commands are parsed.
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
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dinov2_eq.config.load import find_recipe, load_config, to_dict
from dinov2_eq.config.schema import default_config
from dinov2_eq.models import build_backbone
from dinov2_eq.run.cli import COMMANDS, find_command, main
from dinov2_eq.run.published import BUDGET, PAPER, read_table
from dinov2_eq.run.submit import PROGRAMS
from dinov2_eq.run.sweep_file import read_sweep
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
FLAGS_OF_OTHERS = {"--batch": "scancel", "--signal": "sbatch", "--max-restarts": "torchrun"}
NO_SETTINGS = {"train.parquet", "train.sh"}  # files


class Block(NamedTuple):
    mark: str | None  # why it is not run, and where it is; None: it is run
    language: str
    text: str

    @property
    def kind(self) -> str:
        if self.language in ("", "bash", "sh"):
            return "files" if self.text.startswith("runs/") else "commands"
        return self.language

    @property
    def commands(self) -> list[str]:
        """One command per line, without comments."""
        text = re.sub(r"(^|\s+)#.*", "", self.text.replace("\\\n", " "), flags=re.MULTILINE)
        return [line for line in text.splitlines() if line] if self.kind == "commands" else []


class Page:
    """A Markdown page, split into code blocks, prose and `code` spans."""

    def __init__(self, name: str) -> None:
        self.path = PAGES[name]
        pattern = re.compile(r"(?:<!-- not run: ([^>]+) -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
        text = self.path.read_text()
        self.blocks = [Block(*found.groups()) for found in pattern.finditer(text)]
        self.marked = [block for block in self.blocks if block.mark is not None]
        self.prose = pattern.sub("", text)
        self.spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", self.prose)]
        self.names: dict[str, Any] = {}  # what its Python defined

    def follow(self) -> None:
        """Runs the blocks of the page in the working directory, from top to bottom."""
        for block in self.blocks:
            if block.mark is not None:
                continue
            if block.kind == "python":
                exec(compile(block.text, self.path, "exec"), self.names)
            elif block.kind == "yaml":
                (file,) = {file for each in self.blocks for file in re.findall(r"--config-file (\S+\.yaml)", each.text)}
                Path(file).write_text(block.text)
            elif block.kind == "files":
                folder, *lines = block.text.splitlines()
                for file in ", ".join(re.split(r"\s{2,}", line.strip())[0] for line in lines).split(", "):
                    assert list(Path(folder).glob(file.rstrip("/").replace("<step>", "*"))), file
            for command in block.commands:
                run(command)


def run(command: str) -> None:
    program, *words = shlex.split(command)
    if program == "dinov2-eq":
        assert in_this_process(words) == 0, command
    else:
        assert program == "python", f"neither run here nor marked as not run: {command}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words)
            runpy.run_path(words[0], run_name="__main__")
    for output in re.findall(r"--output(?:-dir)? (\S+)", command):
        assert Path(output).exists() or "--dry-run" in words, command


def parse(command: str) -> None:
    """Fails if one of our programs rejects these arguments, or if a config does not load with these settings.

    Placeholders such as `key=...`, and variables of the shell such as `$@`, are ignored.
    """
    program, *words = shlex.split(command)
    if program == "make":
        assert set(words) <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)), command
    elif program == "python":
        tool = importlib.import_module(words.pop(0).removesuffix(".py").replace("/", "."))
        if words:
            tool.build_parser().parse_args(words)
    else:
        name, words = find_command([word for word in words if not re.fullmatch(r"[\w.]+=\.\.\.|\$\S+", word)])
        parser = importlib.import_module(COMMANDS[name][0]).build_parser()
        parser.allow_abbrev = False  # the first letters of a flag are not its name
        if name == "submit":
            args, words = parser.parse_known_args(words)
            parse(shlex.join(["dinov2-eq", *PROGRAMS[args.name].split(), *words]))
        elif name == "sweep":
            args = parser.parse_intermixed_args(words)
            read_sweep(find_recipe(args.config_file, kind="sweep"), args.overrides)
        elif name == "reproduce":
            args = parser.parse_intermixed_args(words)
            read_table(find_recipe(args.table, kind="reproduce"), PAPER if args.budget is None else BUDGET)
        elif "overrides" in (args := parser.parse_intermixed_args(words)):
            load_config(args.config_file, args.overrides)


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A folder with images in the layouts of the pages, weights with DINOv2's names, and a run with an evaluation."""
    folder = tmp_path_factory.mktemp("template")
    generator = np.random.default_rng(0)
    classes = ("n01440764", "n01443537")  # names that ImageNet's layout has
    places = [f"{name}/{of}" for name in ("train", "imagenet/train", "val", "imagenet/val") for of in classes]
    for place in ["images", "sketches/goldfish", "sketches/tench", *places]:
        (folder / "data" / place).mkdir(parents=True)
        for number in range(2 if "val" in place else 10):
            pixels = generator.integers(0, 256, (40 + number, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "data" / place / f"{number}.JPEG", "JPEG")
    backbone = build_backbone("vit_small", patch_size=14, img_size=518, depth=1, layerscale=1.0)
    torch.save(backbone.state_dict(), folder / "dinov2_vits14_pretrain.pth")
    do_train(tiny_config("student.depth=4", "optim.steps=2", "evaluation.sample_period_steps=2"), folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        data = "--train-dataset ImageFolder:root=data/train --val-dataset ImageFolder:root=data/val --num-workers 0"
        run(f"dinov2-eq eval linear --encoder run {data} --epochs 1 --epoch-length 2 --batch-size 4")
    return folder


@pytest.fixture
def checkout(template, tmp_path, monkeypatch) -> None:
    """Changes to a checkout with data and two runs, on a host whose SLURM accepts every job and runs none."""
    for path in (ROOT / "hubconf.py", ROOT / "tools", template / "data", template / "dinov2_vits14_pretrain.pth"):
        (tmp_path / path.name).symlink_to(path)
    for name in ("mine", "other"):
        shutil.copytree(template / "run", tmp_path / "runs" / name)
    sbatch = tmp_path / "bin/sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text('#!/bin/sh\nbash -n "$1" && echo "$1" >>jobs.txt && echo Submitted batch job 7\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(sbatch.parent), os.environ["PATH"]]))
    monkeypatch.chdir(tmp_path)
    # Other processes would take longer to start than to read a few images, or to evaluate.
    monkeypatch.setattr(DataLoader, "num_workers", property(lambda _: 0, lambda *_: None), raising=False)
    stand_in_for_programs(monkeypatch, in_this_process)


def quickstart(page: Page) -> None:
    """The same command is finished, with optim.steps=20 it resumes, and the model gives one class token."""
    again = page.blocks[1].commands[0]
    run(again)
    assert "this run is finished: step 10 of optim.steps=10" in Path("runs/first/logs/log.0.txt").read_text()
    run(f"{again} optim.steps=20 evaluation.knn_period_steps=0")
    assert Path("runs/first/eval/training_20/teacher_checkpoint.pth").exists()
    assert page.names["model"](torch.zeros(1, 3, 32, 48)).shape == (1, 192)


def readme(page: Page) -> None:
    """Training works with the custom transform, from a module that Python can import."""
    (name,) = re.findall(r"`(equivariance\.transform=\S+:\w+)`", page.prose)
    module, _ = name.removeprefix("equivariance.transform=").split(":")
    file = Path(*module.split(".")).with_suffix(".py")
    file.parent.mkdir(parents=True)
    file.write_text(next(block.text for block in page.blocks if block.language == "python"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(os.getcwd())
        quick = "optim.steps=5 evaluation.knn_period_steps=0 evaluation.sample_period_steps=0"
        run(f"dinov2-eq train --config-file debug --output-dir runs/transform {quick} {name}")


def evaluation(page: Page) -> None:
    """The list was evaluated; without results, submitting it makes four jobs."""
    for ending in ("md", "csv", "json", "html"):
        assert Path(f"results/summary.{ending}").exists()
    assert "failed" not in Path("results/summary.md").read_text()
    assert Path("runs/mine/report_card.html").exists()
    shutil.rmtree("results")
    run(page.blocks[-1].commands[-1])
    assert "failed" not in Path("results/summary.md").read_text()
    assert len(Path("jobs.txt").read_text().splitlines()) == 4


def export(page: Page) -> None:
    """The calls in the table load the exports."""
    for library in ("timm", "transformers"):
        (call,) = (span for span in page.spans if span.startswith(f"{library}."))
        folder = Path("exports", {"transformers": "hf"}.get(library, library)).absolute()
        call = re.sub(r"(?<=[(:])FOLDER", str(folder), call).replace(f"({folder})", f"({str(folder)!r})")
        assert eval(call, {library: importlib.import_module(library)}).state_dict()


CLAIMS = {
    "README.md": readme,
    "docs/quickstart.md": quickstart,
    "docs/evaluation.md": evaluation,
    "docs/export.md": export,
}


@pytest.mark.parametrize("name", [name for name in PAGES if len(Page(name).blocks) > len(Page(name).marked)])
@pytest.mark.usefixtures("checkout")
def test_the_page_can_be_followed(name):
    page = Page(name)
    page.follow()
    CLAIMS.get(name, lambda _: None)(page)


@pytest.mark.parametrize("name", PAGES)
def test_what_is_not_run_has_a_reason(name):
    """The file or test that the mark names must exist."""
    page = Page(name)
    assert "<!-- not run" not in page.prose, "a mark without a reason, or not on the line above a block"
    assert {block.kind for block in page.blocks} <= {"commands", "files", "python", "yaml"}, "nothing runs this"
    for block in page.marked:
        reason, _, where = block.mark.partition("; see ")
        assert re.fullmatch(r"\w[^/]*", reason), f"not 'REASON' or 'REASON; see FILE::TEST': {block.mark}"
        file, _, test = where.partition("::")
        assert not where or (ROOT / file).is_file(), where
        assert not test or test in {getattr(node, "name", "") for node in ast.parse((ROOT / file).read_text()).body}


@pytest.mark.parametrize("name", PAGES)
def test_what_is_not_run_can_be_parsed(name):
    """Our own commands in marked blocks, and tools in running text."""
    page = Page(name)
    for command in [command for block in page.marked for command in block.commands]:
        if ours := re.search(r"(^make|dinov2-eq|python tools/).*", command):
            parse(ours[0])
    for span in page.spans:
        if span.startswith(("make ", "python tools/")):
            parse(span)


@cache
def flags_of(command: str) -> set[str]:
    """The flags in the help of a command; `submit` also has those of its programs."""
    with contextlib.redirect_stdout(StringIO()) as output, pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    own = set(re.findall(r"(?<![\w-])--[\w-]+", output.getvalue()))
    programs = [name for name in COMMANDS if name.startswith(("train", "eval "))] if command == "submit" else []
    return own.union(*map(flags_of, programs))


@pytest.mark.parametrize("name", PAGES)
def test_flags_in_running_text_exist(name):
    """Checks whole commands, and flags by themselves."""
    every = set().union(*map(flags_of, COMMANDS)) | FLAGS_OF_OTHERS.keys()
    for span in Page(name).spans:
        if span.startswith("dinov2-eq "):
            command, rest = find_command(span.split()[1:])
            assert {word for word in rest if word.startswith("--")} <= flags_of(command), span
        elif span.startswith("--"):
            assert re.match(r"--[\w-]+", span)[0] in every, span


@cache
def settings() -> set[str]:
    return {f"{section}.{key}" for section, values in to_dict(default_config()).items() for key in values}


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
    text = PAGES["README.md"].read_text()
    named = re.search(r"packaged recipe \((.*?)\)", text, re.DOTALL)[1]
    table = text.partition("| method | recipes |")[2].partition("\n\n")[0]
    named += "".join(row.split("|")[2] for row in table.splitlines()[2:])
    folder = ROOT / "configs/train"
    recipes = {str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml")}
    named_recipes = set()
    for name in re.findall(r"`(\S+)`", named):
        found = {recipe for recipe in recipes if re.fullmatch(name.replace("...", ".*"), recipe)}
        assert found, name
        named_recipes |= found
    assert named_recipes == recipes


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
