import logging

import pytest
from PIL import Image

from dinov2_eq.data.corrupt import MAX_IN_A_ROW, CorruptCounter, read_or_next
from dinov2_eq.data.datasets import DataError, build_dataset


def make_folder(root, num_images, broken):
    for index in range(num_images):
        path = root / f"{index:03d}.png"
        if index in broken:
            path.write_bytes(b"broken")
        else:
            Image.new("RGB", (4, 4), (index, 0, 0)).save(path)
    return build_dataset(f"Folder:root={root}")


def test_the_next_readable_image_stands_in(tmp_path):
    dataset = make_folder(tmp_path, 5, broken={1, 2, 4})
    image, skipped = read_or_next(dataset, 1)
    assert image.getpixel((0, 0)) == (3, 0, 0)
    assert [name[-7:] for name in skipped] == ["001.png", "002.png"]
    image, skipped = read_or_next(dataset, 4)  # past the end it starts over
    assert image.getpixel((0, 0)) == (0, 0, 0)
    assert read_or_next(dataset, 3)[1] == ()


@pytest.mark.parametrize(("num_images", "expected"), [(3, 3), (MAX_IN_A_ROW + 20, MAX_IN_A_ROW)])
def test_a_folder_of_corrupt_files(tmp_path, num_images, expected):
    dataset = make_folder(tmp_path, num_images, broken=range(num_images))
    with pytest.raises(DataError, match=rf"{expected} images in a row .*could not be read; the first: .*000\.png"):
        read_or_next(dataset, 0)


def test_counter_names_each_once(caplog):
    counter = CorruptCounter(0.5)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            counter.add(["bad.png"], 10)
    assert [record.getMessage() for record in caplog.records] == ["Unreadable image skipped: bad.png"]


def test_counter_stops_above_the_share_but_not_early():
    counter = CorruptCounter(0.01)
    counter.add(["a.png", "b.png"], 50)  # 4 %, but of 52
    counter.add([], 148)  # 2 of 200
    with pytest.raises(DataError, match=r"3 of 251 .*train.max_corrupt_share=0.01.*a.png, b.png, c.png"):
        counter.add(["c.png"], 50)


def test_counter_tolerates_nothing_at_share_0_and_all_at_1():
    CorruptCounter(1.0).add([str(number) for number in range(500)], 0)
    with pytest.raises(DataError):
        CorruptCounter(0.0).add(["a.png"], 99)


def test_counter_goes_on_after_a_resume():
    counter, resumed = CorruptCounter(0.01), CorruptCounter(0.01)
    counter.add(["a.png", "b.png"], 298)
    resumed.load_state_dict(counter.state_dict())
    with pytest.raises(DataError, match="4 of 302"):
        resumed.add(["c.png", "d.png"], 0)
