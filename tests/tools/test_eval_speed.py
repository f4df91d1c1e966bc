import json

from dinov2_eq.tools import eval_speed


def test_both_comparisons(capsys):
    small = "--repeats 1 --train-images 200 --val-images 3 --classes 20 --batch-size 1 --image-size 32 --device cpu"
    eval_speed.main(small.split())
    result = json.loads(capsys.readouterr().out)
    for name in ("knn", "features"):
        times = result[name]
        assert times["ours"] > 0 and times["ratio"] == times["reference"] / times["ours"]
