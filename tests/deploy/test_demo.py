"""The demo has data for as many sites as it offers."""

from __future__ import annotations

import numpy as np
import pytest

from fedmerge.deploy.demo import DATA, demo_names, write_demo_data


@pytest.mark.parametrize("number", [2, 3, 4, 7, 25])
def test_every_site_of_the_demo_has_images_of_its_own(tmp_path, number):
    names = demo_names(number)
    write_demo_data(tmp_path, names)
    sizes = set()
    for name in names:
        with np.load(tmp_path / "sites" / name / DATA) as data:
            sizes.add(tuple(len(data[f"y{split}"]) for split in ("", "_validation", "_test")))
            assert data["x"].shape[1:] == (1, 8, 8)
    assert len(sizes) == 1
    assert min(sizes.pop()) >= 8
    assert list(names) == sorted(names)
