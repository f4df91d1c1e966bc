"""`dinov2-eq submit` without a cluster: what it asks SLURM for, what it refuses, and jobs on this host."""

import importlib
import json
import pickle
import re
import time
from pathlib import Path

import pytest

from dinov2_eq.config.load import load_config
from dinov2_eq.run.cli import COMMANDS, main
from dinov2_eq.run.job import Job
from dinov2_eq.run.precheck import Resources, check_training
from dinov2_eq.run.submit import PROGRAMS, build_parser, local_parameters
from dinov2_eq.train.train import do_train
from tests.helpers import TINY, tiny_config
from tests.rendered import write_objects

TRAIN = ["submit", "train", "--config-file", "debug", "--output-dir", "run", *TINY]
DATA = ["--train-dataset", "Shapes:split=TRAIN:num=24:size=32", "--val-dataset", "Shapes:split=VAL:num=12:size=32"]


@pytest.fixture(autouse=True)
def host_without_slurm(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    do_train(tiny_config("student.depth=4"), folder)  # as many blocks as `eval linear` reads
    return folder


def script(capsys, *arguments: str) -> list[str]:
    """The lines of the sbatch script."""
    assert main([*TRAIN, "--print-sbatch", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def wait_for(path: Path, log: str, seconds: float = 90) -> None:
    """Waits for a file of a job on this host; `log` is a pattern for the files with its log lines."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, "\n".join(log.read_text() for log in Path().glob(log))
        time.sleep(0.1)


def test_defaults_of_the_script(capsys):
    lines = script(capsys)
    for expected in (
        "--nodes=1",
        "--gpus-per-node=8",
        "--ntasks-per-node=8",
        "--cpus-per-task=10",
        "--mem=0G",
        "--time=2800",
        "--signal=USR2@120",
        "--requeue",
        "--job-name=dinov2-eq-train",
    ):
        assert f"#SBATCH {expected}" in lines
    # Nothing about a site.
    assert not [
        line for line in lines if re.match(r"#SBATCH --(partition|account|qos|constraint|comment|exclude)", line)
    ]
    assert list(Path().iterdir()) == []


def test_flags_reach_the_script(capsys):
    flags = "--nodes 2 --gpus-per-node 4 --partition gpu --timeout 60 --signal-delay 90 --mem-gb 200 --cpus-per-task 6"
    lines = script(
        capsys, *flags.split(), "--comment", "for a deadline", "--exclude", "node[3-4]", "--job-name", "mine"
    )
    for expected in ("nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "partition=gpu", "time=60", "signal=USR2@90"):
        assert f"#SBATCH --{expected}" in lines
    for expected in ("mem=200G", "cpus-per-task=6", "comment='for a deadline'", "exclude='node[3-4]'", "job-name=mine"):
        assert f"#SBATCH --{expected}" in lines
    (srun,) = (line for line in lines if line.startswith("srun"))
    assert "--cpus-per-task=6" in srun


def test_any_parameter_of_sbatch(capsys):
    own = ["qos=high", "constraint=volta32gb", "exclusive", "gres=gpu:a100:8", "mem-per-gpu=40G"]
    lines = script(capsys, *(word for parameter in own for word in ("--slurm", parameter)))
    for expected in ("qos=high", "constraint=volta32gb", "exclusive", "gres=gpu:a100:8", "mem-per-gpu=40G"):
        assert f"#SBATCH --{expected}" in lines
    # What would contradict them is left out.
    assert not [line for line in lines if line.startswith(("#SBATCH --gpus-per-node", "#SBATCH --mem="))]
    assert "#SBATCH --ntasks-per-node=8" in lines


def test_names_that_dinov2_has(capsys):
    for flags in ("--ngpus 4 --nodes 2", "--gpus 4 --nnodes 2", "--gpus-per-node 4 --nodes 2"):
        lines = script(capsys, *flags.split())
        assert "#SBATCH --gpus-per-node=4" in lines and "#SBATCH --nodes=2" in lines


def test_the_plan_counts_all_processes(capsys):
    assert main([*TRAIN, "--nodes", "2", "--dry-run", "--cluster", "local"]) == 2
    assert "--nodes 2: --cluster local only uses this host" in capsys.readouterr().err
    assert main([*TRAIN, "--tasks-per-node", "3", "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "--cluster local, as sbatch is not on PATH" in output and "effective batch    12 images" in output
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.sed=1"], "unknown key 'train.sed'"),
        (["train.dataset_path=Folder:root=/does/not/exist"], "/does/not/exist"),
        (
            ["evaluation.knn_period_steps=1", "evaluation.knn_val_dataset=Folder:root=/does/not/exist"],
            "/does/not/exist",
        ),
        (["equivariance.transform=nowhere:Nothing"], "'nowhere' cannot be imported"),
        (["--output-dir", "/proc/run"], "/proc/run cannot be written"),
        (["--cluster", "slurm"], "sbatch is not on PATH"),
        (["--gpus-per-node", "64"], "--gpus-per-node 64: torch sees"),
        (["--print-sbatch", "--tasks-per-node", "2"], "--tasks-per-node 2: each of the 8 GPUs"),
        (["--cluster", "debug", "--tasks-per-node", "2"], "--cluster debug is one process, not 2"),
        (["--gpu-memory", "0.01"], "more than 90% of --gpu-memory 0.01"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_nothing(arguments, message, capsys):
    assert main([*TRAIN, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert list(Path().iterdir()) == []


def test_what_the_config_gives_to_say_is_in_the_summary_and_the_job_has_the_settings():
    Path("theirs.yaml").write_text("base: debug\nstudent: {block_chunks: 2}\n")
    argv = ["--config-file", "theirs.yaml", "--output-dir", "run", *TINY, "teacher.warmup_teacher_temp_epochs=0.0016"]
    argv.remove("teacher.warmup_teacher_temp_steps=2")
    checked = check_training(argv, Resources(1, 0, 1), None)
    for sentence in (
        "block_chunks (each block",
        "epochs=0.0016 is teacher.warmup_teacher_temp_steps=2",
        "effective batch",
    ):
        assert checked.summary.count(sentence) == 1
    Path("job.yaml").write_text(checked.config)
    remarks: list[str] = []
    assert load_config("job.yaml", tell=remarks.append) == tiny_config("student.ffn_layer=mlp") and not remarks


@pytest.mark.parametrize("command", [command for command in PROGRAMS.values() if command != "train"])
def test_every_evaluation_shares_its_work_among_the_processes_of_a_job(command, monkeypatch):
    class Joined(Exception):
        pass

    def join(args):
        raise Joined

    monkeypatch.setattr("dinov2_eq.evaluation.base.evaluation_processes", join)
    with pytest.raises(Joined):
        importlib.import_module(COMMANDS[command][0]).main(["--encoder", "random:vit_tiny/16"])


def test_a_run_that_could_not_go_on_is_refused(run_folder, capsys):
    command = [
        "submit",
        "train",
        "--config-file",
        "debug",
        *TINY,
        "--dry-run",
        "--output-dir",
        str(run_folder),
        "student.depth=4",
    ]
    assert main(command) == 0
    assert main([*command, "train.seed=1"]) == 2
    assert "train.seed was 0, now 1" in capsys.readouterr().err
    assert main([*command, "train.seed=1", "--no-resume"]) == 0


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """Data of `eval 3diebench`, which reads one kind of data only."""
    root = tmp_path_factory.mktemp("rendered")
    objects = {"train": ["0/a", "1/b"], "val": ["1/c"]}
    write_objects(root, objects, {"train": [0, 1], "val": [1]}, views=2)
    strings = [f"3DIEBench:split={split.upper()}:root={root}" for split in objects]
    return ["--train-dataset", strings[0], "--val-dataset", strings[1]]


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name != "train"])
def test_evaluations_check_without_computing(name, run_folder, rendered, tmp_path, capsys):
    before = sorted(run_folder.rglob("*"))
    data = rendered if name == "3diebench" else DATA
    command = ["submit", name, "--dry-run", "--output-dir", str(tmp_path / "out"), *data]
    assert main([*command, "--pretrained-weights", str(run_folder)]) == 0
    assert "encoder and data are available" in capsys.readouterr().out
    assert sorted(run_folder.rglob("*")) == before and list(tmp_path.iterdir()) == []
    assert main([*command, "--pretrained-weights", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_flag_means_two_things(name):
    """All flags are on one command line, so submit must not take any that belongs to the program."""
    program = importlib.import_module(COMMANDS[PROGRAMS[name]][0]).build_parser()
    flags = [set(parser._option_string_actions) - {"-h", "--help"} for parser in (program, build_parser())]
    assert not flags[0] & flags[1]


def test_gpus_that_are_not_this_users_stay_hidden(monkeypatch):
    args = build_parser().parse_args(["train"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert local_parameters(args, Resources(1, 2, 2))["visible_gpus"] == (4, 5)
    assert local_parameters(args, Resources(1, 0, 1))["visible_gpus"] == ()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-0a1b")
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=GPU-0a1b: list the GPUs by number"):
        local_parameters(args, Resources(1, 1, 1))


def test_a_job_holds_strings_only():
    job = pickle.loads(pickle.dumps(Job(["train", "--no-resume", "--output-dir", "runs/%j"], "/somewhere")))
    assert vars(job) == {"argv": ["train", "--no-resume", "--output-dir", "runs/%j"], "folder": "/somewhere"}
    # What is queued again goes on; it does not start again.
    assert job.checkpoint().function.argv == ["train", "--output-dir", "runs/%j"]


def test_two_processes_on_this_host(monkeypatch, capsys):
    """The processes have ranks, and run a copy of code and settings in the folder of the submission."""
    Path("modules").mkdir()
    Path("modules/mine.py").write_text(
        "from pathlib import Path\nimport dinov2_eq\nfrom dinov2_eq.equivariance.transforms import SE2\n"
        "class Mine(SE2):\n    def __init__(self, ranges):\n        super().__init__(ranges)\n"
        "        Path('imported').write_text(dinov2_eq.__file__)\n"
    )
    monkeypatch.setenv("PYTHONPATH", "modules")
    monkeypatch.syspath_prepend("modules")
    overrides = ["equivariance.transform=mine:Mine", "fsdp.strategy=ddp"]
    assert main([*TRAIN, "--output-dir", "runs/%j", "--tasks-per-node", "2", *overrides]) == 0
    number = re.search(r"job (\d+) has started", capsys.readouterr().out)[1]
    run = Path("runs", number)
    wait_for(run / "eval/training_6/teacher_checkpoint.pth", "runs/submitit/*/*.out")
    assert sorted(path.name for path in (run / "logs").iterdir()) == ["log.0.txt", "log.1.txt"]
    assert load_config(str(run / "config.yaml")) == tiny_config(*overrides)
    (submission,) = Path("runs/submitit").iterdir()
    assert Path("imported").read_text() == str(submission.absolute() / "code/dinov2_eq/__init__.py")
    for part in ("eval/knn.py", "tools/report.py", "configs/train/debug.yaml"):
        assert (submission / "code/dinov2_eq" / part).is_file()


def test_an_evaluation_on_this_host(run_folder, capsys):
    flags = ["--pretrained-weights", str(run_folder), "--output-dir", "out", "--nb_knn", "5", "--num-workers", "0"]
    assert main(["submit", "knn", "--cluster", "local", *flags, *DATA]) == 0
    wait_for(Path("out/results_eval_knn.json"), "out/submitit/*/*.out")
    assert set(json.loads(Path("out/results_eval_knn.json").read_text())["results"]["full"]) == {"5"}


def test_debug_runs_in_this_process(capsys):
    assert main([*TRAIN, "--cluster", "debug", "--output-dir", "runs/%j"]) == 0
    assert Path("runs/debug/eval/training_6/teacher_checkpoint.pth").exists()
