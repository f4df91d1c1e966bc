"""The page of `dinov2-eq eval all` has every number in its place, and names what is missing."""

from dinov2_eq.report import render_evaluations
from tests.browser import needs_browser, opened, require_sound
from tests.report.reading import Page

HEADER = ["encoder", "knn: full 20 top1", "logreg: C"]
ROWS = [["runs/<one>", "61.25", "0.1"], ["two", "", "3.162"]]


def test_a_row_for_each_number_and_a_column_for_each_encoder():
    html = render_evaluations(HEADER, ROWS, ["two, knn: failed; k > <n>"])
    page = Page(html)
    assert page.rows == [
        ["encoder", "runs/<one>", "two"],
        ["knn: full 20 top1", "61.25", ""],
        [HEADER[2], "0.1", "3.162"],
    ]
    assert "two, knn: failed; k > <n>" in page.text and "<one>" not in html
    assert "2 encoders, 2 numbers each" in page.text
    assert all(address.startswith(("data:", "#")) for address in page.addresses)


def test_nothing_measured_yet():
    assert "1 encoder, 0 numbers each" in Page(render_evaluations(["encoder"], [["one"]], [])).text


@needs_browser
def test_browser_shows_it_without_errors_or_requests(tmp_path):
    path = tmp_path / "summary.html"
    path.write_text(render_evaluations(HEADER, ROWS, []), encoding="utf-8")
    with opened(path, tmp_path / "profile") as browser:
        assert require_sound(browser, path) == 0
