import logging

import pytest
import torch.distributed as dist
from PIL import Image

from dinov2_eq.data.corrupt import MAX_IN_A_ROW, CorruptCounter, read_or_next
from dinov2_eq.data.datasets import DataError, ImageDataset, UnreadableImage, build_dataset
from tests.processes import run_ranks


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
    image, skipped = read_or_next(dataset, 1, dataset.read)
    assert image.getpixel((0, 0)) == (3, 0, 0)
    assert [text[: text.index(": ")][-7:] for text in skipped] == ["001.png", "002.png"]
    assert all("not an image, or in a format that is not supported" in text for text in skipped)
    image, skipped = read_or_next(dataset, 4, dataset.read)  # past the end it starts over
    assert image.getpixel((0, 0)) == (0, 0, 0)
    assert read_or_next(dataset, 3, dataset.read)[1] == ()


@pytest.mark.parametrize(("num_images", "expected"), [(3, 3), (MAX_IN_A_ROW + 20, MAX_IN_A_ROW)])
def test_a_folder_of_corrupt_files(tmp_path, num_images, expected):
    dataset = make_folder(tmp_path, num_images, broken=range(num_images))
    with pytest.raises(DataError, match=rf"{expected} images in a row .*could not be read; the first: .*000\.png"):
        read_or_next(dataset, 0, dataset.read)


class Chunks(ImageDataset):
    """Numbers as images, in two chunks of 150; the first cannot be read."""

    data_string = "Chunks"

    def __init__(self, num_readable):
        self.num_readable = num_readable

    def __len__(self):
        return 150 + self.num_readable

    def name(self, index):
        return f"image {index}"

    def read(self, index):
        if index < 150:
            raise UnreadableImage("first chunk", "damaged", rest=149 - index)
        return index


def test_images_that_cannot_be_read_for_one_reason_are_passed_over_at_once():
    chunks, unreadable = Chunks(150), Chunks(0)
    assert read_or_next(chunks, 20, chunks.read) == (150, ("first chunk: damaged",))
    with pytest.raises(DataError, match="150 images in a row of 'Chunks' could not be read; the first: first chunk"):
        read_or_next(unreadable, 20, unreadable.read)


def test_counter_names_each_once(caplog):
    counter = CorruptCounter(0.5)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            counter.add(["bad.png"], 10)
    assert [record.getMessage() for record in caplog.records] == ["Unreadable image skipped: bad.png"]


def test_counter_stops_above_the_share_but_not_early():
    counter = CorruptCounter(0.01)
    counter.add(["a.png", "b.png"], 50)
    counter.check()  # 4 %, but of 52
    counter.add([], 148)
    counter.check()  # 2 of 200
    counter.add(["c.png"], 50)
    with pytest.raises(DataError, match=r"3 of 251 .*train.max_corrupt_share=0.01.*a.png, b.png, c.png"):
        counter.check()


def test_counter_may_be_checked_now_and_then():
    counter = CorruptCounter(0.5)
    for number in range(4):
        counter.add([f"{number}.png"], 50)
    assert counter.num_corrupt == 0
    counter.check()
    counter.check()
    assert counter.state_dict() == {"num_read": 200, "num_corrupt": 4}


def test_counter_tolerates_nothing_at_share_0_and_all_at_1():
    tolerant, strict = CorruptCounter(1.0), CorruptCounter(0.0)
    tolerant.add([str(number) for number in range(500)], 0)
    tolerant.check()
    strict.add(["a.png"], 99)
    with pytest.raises(DataError):
        strict.check()


def test_counter_goes_on_after_a_resume():
    counter, resumed = CorruptCounter(0.01), CorruptCounter(0.01)
    counter.add(["a.png", "b.png"], 298)
    counter.check()
    resumed.load_state_dict(counter.state_dict())
    resumed.add(["c.png", "d.png"], 0)
    with pytest.raises(DataError, match="4 of 302"):
        resumed.check()


def count_on_one_of_several_ranks():
    dist.init_process_group("gloo")
    counter = CorruptCounter(0.005)
    counter.add([], 100)
    counter.check()
    counter.add(["bad.png", "worse.png"] if dist.get_rank() == 1 else [], 50)
    try:
        counter.check()
    except DataError as error:
        return str(error), counter.state_dict()
    finally:
        dist.destroy_process_group()


def test_all_processes_stop_together_with_the_same_message():
    ranks = run_ranks(count_on_one_of_several_ranks, 2)
    assert ranks[0] == ranks[1]
    message, state = ranks[0]
    assert "2 of 302 images" in message and "bad.png, worse.png" in message
    assert state == {"num_read": 300, "num_corrupt": 2}
