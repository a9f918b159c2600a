"""A user's own network by import path, and what one is told when that does not work."""

import sys

import pytest
import torch
from torch import nn

from fedmerge.core.errors import UsageError
from fedmerge.models.imported import Imported

SOURCE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, input_shape, num_classes, width=3):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(input_shape[0], width), nn.Linear(width, num_classes))
    def forward(self, x):
        return self.layers(x)

def fixed():
    return nn.Linear(4, 2)

def picky(num_classes, *, size):
    return nn.Linear(size, num_classes)

def failing(num_classes):
    raise ValueError("the moon is full")

def wrong():
    return [1, 2]

number = 7
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(SOURCE)
    return path


def build(path, **options):
    return Imported(str(path), options or None).build((4,), 2)


def test_a_class_in_a_file_gets_shape_and_classes(file):
    module = build(f"{file}:Net")
    assert module(torch.zeros(5, 4)).shape == (5, 2)
    assert module.layers[0].out_features == 3


def test_options_are_passed_on(file):
    assert build(f"{file}:Net", width=9).layers[0].out_features == 9


def test_options_come_before_what_we_offer(file):
    assert build(f"{file}:picky", size=4, num_classes=7).out_features == 7


def test_a_function_need_not_take_anything(file):
    assert isinstance(build(f"{file}:fixed"), nn.Linear)


def test_a_module_path_works_too():
    assert isinstance(build("torch.nn:Linear", in_features=4, out_features=2), nn.Linear)


def test_a_module_on_the_path_works_too(file, monkeypatch):
    monkeypatch.syspath_prepend(file.parent)
    assert isinstance(build("nets:fixed"), nn.Linear)
    monkeypatch.delitem(sys.modules, "nets")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "Nett",
            "unknown name in {file} 'Nett'; did you mean 'Net'? Known: Net, failing, fixed, nn, number, picky, wrong",
        ),
        ("picky", "could not be called: picky() missing 1 required keyword-only argument: 'size'"),
        ("failing", "could not be built: ValueError: the moon is full"),
        ("wrong", "gave a list; expected a torch.nn.Module"),
        ("number", "is a int, which cannot be called; expected a class or a function that gives a torch.nn.Module"),
    ],
)
def test_a_name_that_gives_no_module_is_explained(file, name, message):
    with pytest.raises(UsageError) as refusal:
        build(f"{file}:{name}")
    assert message.format(file=file) in str(refusal.value)


def test_an_option_it_does_not_take_is_explained(file):
    with pytest.raises(UsageError, match=r"could not be called: .*unexpected keyword argument 'depth'"):
        build(f"{file}:Net", depth=3)


def test_a_missing_file_is_named_with_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as refusal:
        build("nowhere.py:Net")
    assert str(refusal.value) == f"no such file: nowhere.py (looked from {tmp_path})"


@pytest.mark.parametrize(
    ("text", "kind"), [("1 / 0", "ZeroDivisionError"), ("def (", "SyntaxError"), ("import nix", "ModuleNotFoundError")]
)
def test_a_file_that_fails_is_explained_and_forgotten(tmp_path, text, kind):
    path = tmp_path / "failing_net.py"
    path.write_text(text)
    with pytest.raises(UsageError, match=rf"failing_net.py could not be run: {kind}: "):
        build(f"{path}:Net")
    assert "_fedmerge_user_failing_net" not in sys.modules


def test_a_module_that_is_not_installed_is_explained():
    with pytest.raises(UsageError, match=r"cannot import 'no_such_package': .*did you mean a path ending in .py"):
        build("no_such_package:Net")


def test_a_module_that_fails_is_explained(tmp_path, monkeypatch):
    (tmp_path / "failing_module.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"failing_module could not be run: ZeroDivisionError: division by zero"):
        build("failing_module:Net")


@pytest.mark.parametrize("path", ["nets.py", "a:b:c", ""])
def test_a_path_without_a_name_is_refused(path):
    with pytest.raises(UsageError, match=r"expected 'package.module:Name' or 'file.py:Name'"):
        Imported(path)
