"""The page of settings is the schema's."""

from tools.config_reference import PAGE, reference


def test_the_page_is_what_the_schema_says():
    assert PAGE.read_text() == reference(), "run python tools/config_reference.py"


def test_it_has_meanings_defaults_and_what_is_allowed():
    lines = {line.split("`")[1]: line for line in reference().splitlines() if line.startswith("| `")}
    assert "`sqrt_wrt_1024`" in lines["optim.scaling_rule"] and "scaled" not in lines["optim.steps"]
    assert "the control" in lines["equivariance.loss_weight"] and "`[0, inf)`" in lines["equivariance.loss_weight"]
    assert "`null`" in lines["student.depth"] and "`[0.485, 0.456, 0.406]`" in lines["crops.mean"]
