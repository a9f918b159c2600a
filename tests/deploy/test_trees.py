"""A method's messages as forms and tensors: every tree comes back, and only a method's tuples can be named."""

import json

import pytest
import torch
from torch.utils._pytree import tree_leaves

from fedmerge.core.errors import FedmergeError
from fedmerge.core.protocol import Batch, Update
from fedmerge.deploy.trees import form_of, tree_from


def there_and_back(tree):
    form = json.loads(json.dumps(form_of(tree)))
    return tree_from(form, tree_leaves(tree))


def test_trees_come_back_with_their_types():
    tree = (Update(torch.arange(3)), [torch.zeros(2), ()], {"a": torch.ones(1), "b": None})
    back = there_and_back(tree)
    assert isinstance(back[0], Update)
    assert torch.equal(back[0].delta, torch.arange(3))
    assert back[1][1] == ()
    assert list(back[2]) == ["a", "b"]
    assert back[2]["b"] is None


def test_a_table_keeps_its_order_of_keys():
    tree = {"b": torch.tensor(1.0), "a": torch.tensor(2.0)}
    back = there_and_back(tree)
    assert {key: value.item() for key, value in back.items()} == {"b": 1.0, "a": 2.0}


@pytest.mark.parametrize(
    "form",
    [
        ["os:system", ["tensor"]],
        ["builtins:list", ["tensor"]],
        ["subprocess:Popen", ["tensor"]],
        ["fedmerge.core.protocol:deliver", ["tensor"]],
        ["fedmerge.core.protocol:Algorithm", ["tensor"]],
        ["fedmerge.nowhere:Update", ["tensor"]],
        ["fedmerge.core.protocol:Update.__init__", ["tensor"]],
        ["fedmerge.core.protocol:Batch", ["tensor"]],
        ["tensor", ["tensor"]],
        ["tensor"] * 3,
        [],
        ["tuple", "tensor"],
        ["dict", ["a"]],
        ["dict", [1, ["tensor"]]],
        [3],
        "tensor",
        None,
        ["tuple"],
        ["tuple", ["tensor"], ["tensor"]],
    ],
)
def test_a_damaged_form_is_refused(form):
    with pytest.raises(FedmergeError):
        tree_from(form, [torch.zeros(1)])


def test_a_form_cannot_make_anything_be_imported(tmp_path, monkeypatch):
    (tmp_path / "sneaky_module.py").write_text("raise SystemExit('it was imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FedmergeError, match="names 'sneaky_module:Thing', which is no tuple of this method"):
        tree_from(["sneaky_module:Thing", ["tensor"]], [torch.zeros(1)], modules=("sneaky_module",))


def test_only_tensors_travel():
    with pytest.raises(TypeError, match="holds a str"):
        form_of(("text",))
    assert form_of(Batch(*[torch.zeros(1)] * 4))[0] == "fedmerge.core.protocol:Batch"
