"""federation.toml: every fault at once, and nothing that only a simulation has."""

import pytest
import tomli_w
from small_deployment import write_federation

from fedmerge.core.errors import UsageError
from fedmerge.deploy.federation import read_federation, terms_of


def faults_of(tmp_path, **options):
    with pytest.raises(UsageError) as caught:
        write_federation(tmp_path / "f", **options)
    return str(caught.value)


def test_all_faults_are_told_together(tmp_path):
    text = faults_of(tmp_path, rounds=0, sites={"a/b": ""}, data={"shape": [2]}, deploy={"deadlin": 3})
    for part in ("run.rounds", "a/b", "class_names", "did you mean 'deadline'?"):
        assert part in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"source": {"name": "digits"}}, "source: got one for a federation"),
        ({"partition": {"name": "iid"}}, "partition: got one for a federation"),
        ({"workers": 4}, "workers: got 4; it has no effect here"),
        ({"fold": 4}, "fold: got 4"),
        ({"finetune_epochs": 1}, "finetune_epochs"),
        ({"checkpoint_every": 5}, "checkpoint_every"),
        ({"runtime": "folded"}, "a site is one client"),
        ({"device": "cuda"}, "each site says so in its own site.toml"),
        ({"attack": {"kind": "sign-flip", "share": 0.2}}, "attack: got one"),
        ({"participation": {"dropout": 0.5}}, "participation.dropout"),
        ({"participation": {"deadline": 3.0}}, "participation.deadline"),
        ({"deploy": {"start_with": 7, "insecure": True}}, "there are 3 sites"),
        ({"deploy": {}}, "no public key"),
        ({"sites": {}}, "sites: none"),
        ({"sites": {"a": 3}}, "expected a public key as a text"),
        ({"sites": 3}, "expected a table"),
    ],
)
def test_what_has_no_effect_or_no_sense_is_refused(tmp_path, options, said):
    assert said in faults_of(tmp_path, **options)


def test_sites_are_clients_in_the_order_of_their_names(tmp_path):
    federation = write_federation(tmp_path / "f", names=("b", "a", "c"))
    assert federation.names == ("a", "b", "c")


def test_terms_survive_their_way_as_json(tmp_path):
    terms = write_federation(tmp_path / "f", participation={"quorum": 0.5}).terms
    assert terms_of(terms.plain()) == terms
    assert terms_of(terms.plain()).digest == terms.digest
    changed = {**terms.plain(), "seed": 99}
    assert terms_of(changed).digest != terms.digest


def test_a_folder_without_a_federation_is_told(tmp_path):
    with pytest.raises(UsageError, match=r"it has no federation\.toml"):
        read_federation(tmp_path)
    (tmp_path / "federation.toml").write_text(tomli_w.dumps({"data": 3}))
    with pytest.raises(UsageError, match="data: got 3; expected a table"):
        read_federation(tmp_path)
