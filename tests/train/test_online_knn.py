"""Labels of the k-NN beside the training: what it needs, and what training itself does not."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2_eq.data.datasets import DataError
from dinov2_eq.report.runs import read_metrics
from dinov2_eq.train.train import do_train
from tests.data.datasets.images import encoded, write_image
from tests.helpers import tiny_config


def packed_labels(path, labels):
    images = [encoded(0, size=(40, 40))] * len(labels)
    pq.write_table(pa.table({"image": images, "label": labels}), path)
    return f"Parquet:path={path}"


def test_knn_k_larger_than_the_data(tmp_path):
    config = tiny_config("evaluation.knn_period_steps=3", "evaluation.knn_k=100")
    with pytest.raises(ValueError, match=r"evaluation.knn_k=100 is more than the \d+ images"):
        do_train(config, tmp_path)


def test_knn_needs_labels(tmp_path):
    write_image(tmp_path / "one.png", 0)
    data = f"Folder:root={tmp_path}"
    config = tiny_config(
        "evaluation.knn_period_steps=3", f"evaluation.knn_train_dataset={data}", f"evaluation.knn_val_dataset={data}"
    )
    with pytest.raises(DataError, match="label"):
        do_train(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("val_labels", "message"),
    [
        ([*range(1, 11)], r"the online k-NN: 1 of the 10 classes of .* have no image in .* \(labels 10\)"),
        ([0.5] * 10, r"the online k-NN needs labels.* is of type double"),
    ],
)
def test_knn_needs_labels_that_fit(tmp_path, val_labels, message):
    data = packed_labels(tmp_path / "train.parquet", [*range(10)])
    val = packed_labels(tmp_path / "val.parquet", val_labels)
    config = tiny_config(
        "evaluation.knn_period_steps=3", f"evaluation.knn_train_dataset={data}", f"evaluation.knn_val_dataset={val}"
    )
    with pytest.raises(DataError, match=message):
        do_train(config, tmp_path / "run")


def test_training_needs_no_usable_labels(tmp_path):
    data = packed_labels(tmp_path / "train.parquet", [[0, 2], None] * 4)
    do_train(tiny_config(f"train.dataset_path={data}"), tmp_path / "run")
    assert read_metrics(tmp_path / "run" / "training_metrics.jsonl")[-1]["step"] == 6
