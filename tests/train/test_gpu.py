"""The same code on a GPU, in bfloat16."""

import json

import pytest
import torch

from dinov2_eq.train.train import do_train
from tests.helpers import tiny_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    "overrides",
    [
        ["equivariance.decoder=conv"],
        ["equivariance.decoder=cross_attention", "equivariance.border=zeros"],
        ["equivariance.transform=color_jitter", "train.centering=sinkhorn_knopp", "crops.local_crops_number=0"],
        ["equivariance.transform=blur", "ibot.separate_head=true", "ibot.head_n_prototypes=64"],
        ["equivariance.enabled=false"],
    ],
)
def test_trains_and_resumes(tmp_path, overrides):
    more = [*overrides, "train.device=cuda", "train.num_workers=2", "evaluation.sample_period_steps=3"]
    do_train(tiny_config(*more, "optim.steps=3"), tmp_path)
    do_train(tiny_config(*more), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "training_metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_a_run_begun_on_a_cpu_goes_on(tmp_path):
    do_train(tiny_config("train.device=cpu", "optim.steps=3"), tmp_path)
    do_train(tiny_config("train.device=cuda"), tmp_path)
    assert (tmp_path / "checkpoints" / "6").is_dir()
