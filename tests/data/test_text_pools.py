"""Pools of texts: what is refused, and how they are dealt out as tokens with tasks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from encoders import Letters, arrays_of, padded
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.core.errors import DataError
from fedmerge.data.deal import deal
from fedmerge.data.encoding import NO_TARGET
from fedmerge.data.federated import ClientData, Examples, FederatedData, check_federation
from fedmerge.data.form import TOKENS, form_from_plain, token_form
from fedmerge.data.partition import ClientPart, Partition
from fedmerge.data.pool import Pool
from fedmerge.data.sources.brown import with_prompts

NO = NO_TARGET
TEXTS = ("ab", "cd", "ef", "gh", "ij", "kl", "mn", "op")
ANSWERS = ("p q", "r", "s", "t", "u", "v", "w", "x")
"""Eight texts of two tasks: rows 0-3 of the first with classes 0 and 1, rows 4-7 of the second with 2 and 3."""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMERGE_CACHE", str(tmp_path))


def pool(**changes):
    values = {
        "name": "toy",
        "inputs": arrays_of(TEXTS),
        "targets": np.array([0, 1, 0, 1, 2, 3, 2, 3]),
        "class_names": ("bad", "good", "ham", "spam"),
        "domain": np.repeat([0, 1], 4),
        "domain_names": ("mood", "mail"),
        "class_tasks": ("mood", "mood", "mail", "mail"),
    }
    return Pool(**{**values, **changes})


def ints(*values):
    return np.array(values, dtype=np.int64)


def partition(pool, *parts, **changes):
    """Client k trains on its first rows, and has one row for validation and one to be tested on."""
    clients = tuple(
        ClientPart(f"c{k}", ints(*rows[:-2]), ints(rows[-2]), ints(rows[-1]), **changes) for k, rows in enumerate(parts)
    )
    return Partition("by hand", 0, {}, pool.name, pool.sha256(), len(pool), clients)


APART = ((0, 1, 2, 3), (4, 5, 6, 7))


# ---------------------------------------------------------------------------------------- the pool


def test_texts_are_told_from_numbers():
    assert pool().is_text
    assert not Pool("n", np.zeros((2, 3), dtype=np.float32), ints(0, 1), ("a", "b")).is_text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_tasks": ("mood",)}, "toy: 1 tasks for 4 classes; expected one each"),
        ({"answers": arrays_of(["a"])}, r"answers are <U1 \[1\] .* expected a text for each of 8 texts"),
        ({"answers": np.zeros(8)}, r"answers are float64 \[8\]"),
        ({"answers": np.array([None] * 8)}, r"answers are object \[8\]"),
        (
            {"answers": arrays_of(ANSWERS), "inputs": np.zeros((8, 2), dtype=np.float32)},
            r"answers are <U3 \[8\] for inputs of type float32",
        ),
        ({"inputs": np.array(TEXTS, dtype=object)}, "inputs are object; expected uint8 images, float32 or texts"),
    ],
)
def test_what_cannot_be_a_pool_of_texts_is_named(changes, message):
    with pytest.raises(DataError, match=message):
        pool(**changes)


@given(st.sampled_from(["inputs", "answers"]), st.integers(0, 7))
def test_the_hash_changes_with_every_text_and_answer(name, row):
    whole = pool(answers=arrays_of(ANSWERS))
    changed = getattr(whole, name).copy()
    changed[row] = "zz"
    assert replace(whole, **{name: changed}).sha256() != whole.sha256()
    assert replace(whole, answers=None).sha256() != whole.sha256()


# ---------------------------------------------------------------------------------------- dealt out


def test_texts_are_dealt_out_as_tokens_with_their_classes_and_tasks():
    texts = pool()
    data = deal(texts, partition(texts, *APART), Letters())
    first, second = data.clients
    assert first.train.inputs.tolist() == [padded(0, 1), padded(2, 3)]
    assert first.train.targets.tolist() == [0, 1]
    assert second.test.inputs.tolist() == [padded(14, 15)]
    assert second.test.targets.tolist() == [3]
    assert data.kind == "classes"
    assert data.class_names == ("bad", "good", "ham", "spam")
    assert data.class_tasks == ("mood", "mood", "mail", "mail")
    assert data.tasks == ("mood", "mail")
    assert data.counts is None
    assert data.class_counts() == ((1, 1, 0, 0), (0, 0, 1, 1))
    assert (data.input_shape, data.form.dtype) == ((6,), TOKENS)
    assert first.train.inputs.dtype == torch.int64


def test_clients_have_no_task_where_one_has_rows_of_two_domains():
    texts = pool()
    assert deal(texts, partition(texts, (0, 4, 2, 6), (1, 5, 3, 7)), Letters()).tasks is None


def test_clients_have_no_task_where_the_pool_has_one_domain_or_none():
    one = pool(domain=np.zeros(8, dtype=np.int64), domain_names=("mood",))
    assert deal(one, partition(one, *APART), Letters()).tasks is None
    none = pool(domain=None, domain_names=())
    assert deal(none, partition(none, *APART), Letters()).tasks is None


def test_numbers_have_tasks_too():
    numbers = pool(inputs=np.arange(16, dtype=np.float32).reshape(8, 2))
    data = deal(numbers, partition(numbers, *APART))
    assert data.tasks == ("mood", "mail")
    assert data.class_tasks == ("mood", "mood", "mail", "mail")


def test_tags_are_what_is_learned_of_a_tagged_pool():
    words = ("a b", "c", "d e", "f", "g", "h", "i", "j")
    tagged = pool(inputs=arrays_of(words), answers=arrays_of(["D N", "N", "D V", "N", "N", "N", "V", "N"]))
    data = deal(tagged, partition(tagged, *APART), Letters("tags"))
    assert (data.kind, data.class_names) == ("tags", ("D", "N", "V"))
    assert data.class_tasks == ()  # of classes, which are not what is learned
    assert data.clients[0].train.targets.tolist() == [padded(0, 1, fill=NO), padded(1, fill=NO)]
    assert data.class_counts() == ((1, 2, 0), (0, 2, 0))  # D N and N; N and N
    assert data.tasks == ("mood", "mail")


def test_completions_are_counted_by_the_class_of_their_prompt():
    prompted = pool(answers=arrays_of(ANSWERS))
    data = deal(prompted, partition(prompted, (0, 1, 2, 3), (4, 6, 5, 7)), Letters("completions"))
    assert (data.kind, data.class_names) == ("completions", ("bad", "good", "ham", "spam"))
    assert data.clients[0].train.targets[0].tolist() == padded(NO, NO, 15, 16, fill=NO)  # "ab" -> "p q"
    assert data.counts == data.class_counts() == ((1, 1, 0, 0), (0, 0, 2, 0))


def test_texts_without_a_language_model_are_refused():
    texts = pool()
    with pytest.raises(DataError, match="toy holds texts, which this network cannot read"):
        deal(texts, partition(texts, *APART))


@pytest.mark.parametrize("changes", [{"rotation": 90.0}, {"invert": True}], ids=str)
def test_texts_that_are_to_be_turned_or_inverted_are_refused(changes):
    texts = pool()
    with pytest.raises(DataError, match="client 'c0' turns or inverts its inputs, which texts cannot be"):
        deal(texts, partition(texts, *APART, **changes), Letters())


def test_clients_may_call_classes_by_names_of_the_same_task():
    texts = pool()
    data = deal(texts, partition(texts, *APART, relabel=(1, 0, 3, 2)), Letters())
    assert data.clients[0].train.targets.tolist() == [1, 0]
    assert data.clients[1].train.targets.tolist() == [3, 2]


def test_clients_may_not_call_classes_by_names_of_another_task():
    """A class is told apart from those of its task only: half of such a client's answers would be no answers."""
    texts = pool()
    with pytest.raises(DataError, match="client 'c0' calls classes of one task by names of another"):
        deal(texts, partition(texts, *APART, relabel=(2, 1, 0, 3)), Letters())


def test_clients_may_not_call_classes_by_other_names_where_no_classes_are_learned():
    prompted = pool(answers=arrays_of(ANSWERS))
    with pytest.raises(DataError, match="client 'c0' calls its classes by other names, but the model's task"):
        deal(prompted, partition(prompted, *APART, relabel=(1, 0, 3, 2)), Letters("completions"))


def test_a_partition_of_other_texts_is_refused():
    texts = pool()
    with pytest.raises(DataError, match="the partition was made for 'toy' with sha256"):
        deal(pool(answers=arrays_of(ANSWERS)), partition(texts, *APART), Letters())


def test_texts_are_cut_into_prompts_and_what_follows():
    """Two words begin; a text of two words has nothing to follow and is left out with its columns."""
    texts = pool(inputs=arrays_of(["a b c", "d e", "f g h i", "j", "k l m", "n o p", "q r s", "t u v"]))
    cut = with_prompts(texts, 2)
    assert cut.inputs.tolist() == ["a b", "f g", "k l", "n o", "q r", "t u"]
    assert cut.answers.tolist() == ["c", "h i", "m", "p", "s", "v"]
    assert cut.targets.tolist() == texts.targets[[0, 2, 4, 5, 6, 7]].tolist()
    assert cut.domain.tolist() == [0, 0, 1, 1, 1, 1]
    assert (cut.user, cut.item, cut.class_names) == (None, None, texts.class_names)


# ---------------------------------------------------------------------------------------- checks


def examples(inputs, targets):
    return Examples(torch.tensor(inputs), torch.tensor(targets))


def federation(targets, kind="tags", inputs=((1, 2, -1), (3, -1, -1))):
    """Of one client, whose targets are these everywhere."""
    three = (examples(inputs, targets),) * 3
    return FederatedData((ClientData("ann", *three),), ("D", "N"), kind=kind)


GOOD = [[0, 1, NO], [1, NO, NO]]


def test_sequences_in_order_pass():
    check_federation(federation(GOOD))
    check_federation(federation([[7, 1, NO], [99, NO, NO]], "completions"))


@pytest.mark.parametrize(
    ("targets", "kind", "message"),
    [
        ([0, 1], "tags", r"client 'ann', train: targets are \[2\]; expected \[2, 3\], one per token"),
        ([[0, 1], [1, 1]], "tags", r"targets are \[2, 2\]; expected \[2, 3\]"),
        ([[0, 2, NO], [1, NO, NO]], "tags", "targets run from 0 to 2; expected 0..1, or -100 for tokens that do not"),
        ([[0, -1, NO], [1, NO, NO]], "tags", "targets run from -1 to 1; expected 0..1"),
        ([[0, -7, NO], [1, NO, NO]], "completions", "targets run from -7 to 1; expected 0 or more, or -100"),
        ([[0, 1, NO], [NO, NO, NO]], "completions", "client 'ann', train: example 1 has no token that counts; drop it"),
    ],
)
def test_sequences_that_cannot_be_learned_are_refused(targets, kind, message):
    with pytest.raises(DataError, match=message):
        check_federation(federation(targets, kind))


def test_a_split_without_sequences_passes():
    data = federation(GOOD)
    (client,) = data.clients
    empty = Examples(client.test.inputs[:0], client.test.targets[:0])
    check_federation(replace(data, clients=(replace(client, test=empty),)))


def test_one_tag_everywhere_is_not_one_class(caplog):
    check_federation(federation([[1, 1, NO], [1, NO, NO]]))
    assert not caplog.text


def test_the_hash_of_a_federation_sees_every_target():
    other = [[0, 1, NO], [0, NO, NO]]
    assert federation(GOOD).sha256() != federation(other).sha256()
    assert federation(GOOD).sha256() == federation(GOOD).sha256()


# ---------------------------------------------------------------------------------------- the form


@pytest.mark.parametrize("length", [1, 64])
def test_the_form_of_tokens_is_read_back_whole(length):
    form = form_from_plain(token_form(length).plain())
    assert form.plain() == token_form(length).plain()
    assert (form.shape, form.dtype, form.columns) == ((length,), TOKENS, None)


def test_tokens_are_scaled_by_nothing():
    tokens = np.array([[3, 1, -1]])
    scaled = token_form(3).scaled(tokens)
    assert scaled.tolist() == tokens.tolist()
    assert scaled.dtype == torch.int64


@pytest.mark.parametrize("change", [{"shape": [0]}, {"dtype": "words"}, {"shape": "x"}, {"mean": None}], ids=str)
def test_a_damaged_form_of_tokens_is_refused(change):
    with pytest.raises(DataError, match="the form of the inputs is damaged"):
        form_from_plain({**token_form(4).plain(), **change})
