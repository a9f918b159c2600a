"""A federation's folder is written whole, and what reads its files accepts them."""

import os
import shutil
import stat
import subprocess
import sys

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.core.errors import UsageError
from fedmerge.deploy import units
from fedmerge.deploy.blueprint import Blueprint, own_program, user_of, write_blueprint, write_derived
from fedmerge.deploy.federation import read_federation
from fedmerge.deploy.identity import describe, line_of_key_file
from fedmerge.deploy.members import add_site, make_site_key, remove_site, renew_certificate, write_site_unit
from fedmerge.deploy.roster import _text_with_sites, read_roster
from fedmerge.experiment.record import RunRecord, write_run

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytest.importorskip("cryptography")

DATA = {"class_names": ["sick", "well"], "shape": [3]}


def blueprint(**changes):
    plain = {
        "name": "Clinics",
        "address": "fed.example.org:9092",
        "sites": ("clinic-b", "clinic-a"),
        "hosts": ("10.1.2.3",),
        "days": 90,
        "config": {"rounds": 3, "method": {"name": "fedavg"}},
        "data": DATA,
        "deploy": {"deadline": 60.0},
        "site_data": {"clinic-a": {"path": "rows.csv"}},
    }
    return Blueprint(**{**plain, **changes})


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "with a space"
    write_blueprint(folder, blueprint())
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A copy that a test may change; its texts name the original."""
    place = tmp_path / "f"
    shutil.copytree(written, place)
    return place


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def table(path):
    return tomllib.loads(path.read_text(encoding="utf-8"))


def test_the_whole_tree_is_there(written):
    own = ["ca.crt", "federation.toml", "node.key", "node.pub", "site.toml"]
    assert files(written) == sorted(
        [
            "federation.toml",
            *("ca.crt", "ca.key", "server.crt", "server.key"),
            "flower/config.toml",
            "app/pyproject.toml",
            "compose.yaml",
            "nginx.conf",
            *(f"sites/{name}/{file}" for name in ("clinic-a", "clinic-b") for file in own),
            *(f"systemd/fedmerge-{name}.service" for name in ("proxy", "run", "server")),
        ]
    )


def test_private_keys_are_their_owners_alone(written):
    keys = list(written.rglob("*.key"))
    assert len(keys) == 4
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}
    assert stat.S_IMODE((written / "sites" / "clinic-a").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (written, written / "logs")} == {0o700}


def test_no_site_has_a_key_of_the_server_or_of_another_site(written):
    place = written / "sites" / "clinic-a"
    others = [(written / name).read_bytes() for name in ("ca.key", "server.key", "sites/clinic-b/node.key")]
    assert not any(path.read_bytes() in others for path in place.iterdir())


def test_what_is_written_is_read_back(written):
    found = read_federation(written)
    assert found.names == ("clinic-a", "clinic-b")
    assert found.deploy.address == "fed.example.org:9092"
    assert found.deploy.listen == "127.0.0.1:9093"
    assert found.deploy.deadline == 60
    assert found.terms.options.rounds == 3
    for name, key in found.sites.items():
        site = written / "sites" / name
        assert line_of_key_file(site / "node.key") == key
        assert (site / "federation.toml").read_bytes() == (written / "federation.toml").read_bytes()


def test_a_site_knows_its_name_its_server_and_its_data_or_has_an_example(written):
    known, unknown = written / "sites" / "clinic-a" / "site.toml", written / "sites" / "clinic-b" / "site.toml"
    plain = {"server": "fed.example.org:9092", "state": "state", "device": "cpu", "anew": False}
    assert table(known) == {"name": "clinic-a", **plain, "data": {"path": "rows.csv"}}
    assert table(unknown) == {"name": "clinic-b", **plain}
    example = unknown.read_text().replace('# [data]\n# path = "examples.csv"', '[data]\npath = "examples.csv"')
    assert tomllib.loads(example)["data"] == {"path": "examples.csv"}


def test_the_certificate_is_for_the_address_and_more(written):
    facts = describe(written / "server.crt")
    assert facts.hosts == ("fed.example.org", "10.1.2.3", "localhost", "127.0.0.1")
    assert 89 < facts.days_left <= 90


def test_flower_reads_its_own_configuration(written, monkeypatch):
    config = pytest.importorskip("flwr.cli.flower_config")
    monkeypatch.setenv("FLWR_HOME", str(written / "flower"))
    connection = config.read_superlink_connection(None)
    assert (connection.name, connection.address) == ("federation", "127.0.0.1:9093")
    assert connection.root_certificates == str(written / "ca.crt")
    assert not connection.insecure


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # in Flower itself
def test_flower_builds_the_app(written):
    build, fields = pytest.importorskip("flwr.cli.build"), pytest.importorskip("flwr.common.config")
    assert fields.validate_config(table(written / "app" / "pyproject.toml"), check_module=True) == (True, [], [])
    bundle = build.build_fab_from_disk(written / "app")
    assert 0 < len(bundle) < 10_000
    assert fields.get_fab_config(bundle)["tool"]["flwr"]["app"]["config"] == {"folder": str(written)}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"sites": ("a", "a")}, "twice"),
        ({"sites": ("a", "A")}, "twice; capitals do not count"),
        ({"sites": ("a/b",)}, "without slashes"),
        ({"sites": ("..",)}, "no dot first"),
        ({"sites": ("a\nb",)}, r"got the name 'a\\nb'"),
        ({"sites": ("",)}, "1 to 100 printable"),
        ({"sites": ("a b",)}, "spaces"),
        ({"name": "x\x1b[2J"}, "characters that can be seen"),
        ({"address": "fed.example.org"}, "expected host:port"),
        ({"address": "fed_x:1"}, "expected host:port"),
        ({"address": "fed.example.org:65535"}, "no next port"),
        ({"listen": "x"}, "listen: got the address 'x'"),
        ({"hosts": ("a b",)}, "expected a DNS name"),
        ({"insecure": True}, r"insecure: got true with address fed\.example\.org:9092; expected a loopback"),
        ({"insecure": True, "address": "127.0.0.1:9092", "listen": "0.0.0.0:9093"}, "with listen"),
        ({"listen": "0.0.0.0:9093"}, r"listen: got 0\.0\.0\.0:9093; .*deploy\.open = true"),
        ({"listen": "10.0.0.1:9093", "deploy": {"open": False}}, "can start any program"),
        ({"days": 0}, "days"),
        ({"config": {"source": {"name": "digits"}}}, r"config\.source: got one for a federation"),
        ({"config": {"sites": {}}}, r"config\.sites: got one"),
        ({"site_data": {"nobody": {}}}, "'nobody', which is no site"),
        ({"deploy": {"address": "x:1"}}, r"deploy\.address: got one; say it as address"),
        ({"deploy": {"dedline": 1.0}}, "did you mean 'deadline'"),
    ],
)
def test_a_blueprint_that_cannot_work_is_refused(changes, fault):
    with pytest.raises(UsageError, match=fault):
        blueprint(**changes)


def test_all_faults_are_told_together():
    with pytest.raises(UsageError) as told:
        blueprint(address="x", sites=("a/b", "c", "C"), hosts=("?",), site_data={})
    faults = [line.partition(":")[0] for line in str(told.value).splitlines()]
    assert faults == [f"Blueprint.{what}" for what in ("address", "hosts", "sites", "sites")]


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UsageError, match="is not an empty folder"):
        write_blueprint(tmp_path, blueprint())
    assert files(tmp_path) == ["mine"]
    write_blueprint(tmp_path / "new" / "deeper", blueprint())


@pytest.mark.parametrize("name", ["a$b", 'a"b', "a'b", "a\nb", "a\\b", "a:b"])
def test_a_path_that_no_text_can_hold_is_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(UsageError, match="expected a path without quotes"):
        write_blueprint(tmp_path / name, blueprint())
    assert list(tmp_path.iterdir()) == []


def test_without_certificates_there_are_no_keys_and_no_proxy(tmp_path):
    roster = write_blueprint(tmp_path, blueprint(address="127.0.0.1:9092", insecure=True))
    assert roster.sites == {"clinic-a": "", "clinic-b": ""}
    assert not [name for name in files(tmp_path) if name.endswith((".key", ".crt", ".pub", "nginx.conf", ".yaml"))]
    assert table(tmp_path / "flower" / "config.toml")["superlink"]["federation"] == {
        "address": "127.0.0.1:9092",
        "insecure": True,
    }


def test_a_superlink_may_be_open_where_that_is_asked_for(tmp_path):
    roster = write_blueprint(tmp_path, blueprint(listen="0.0.0.0:9093", deploy={"open": True}))
    assert (roster.link, roster.deploy.open) == ("0.0.0.0:9093", True)


def test_the_proxy_bounds_requests_as_the_federation_says(written, tmp_path):
    write_blueprint(tmp_path / "small", blueprint(deploy={"largest_request": 16}))
    assert "client_max_body_size 512m;" in (written / "nginx.conf").read_text()
    assert "client_max_body_size 16m;" in (tmp_path / "small" / "nginx.conf").read_text()


def test_on_the_loopback_address_sites_need_no_proxy(tmp_path):
    roster = write_blueprint(tmp_path, blueprint(address="127.0.0.1:9092"))
    assert (roster.link, roster.has_proxy) == ("127.0.0.1:9092", False)
    assert "nginx.conf" not in files(tmp_path)


def test_a_site_with_a_key_of_its_own_is_added(folder, tmp_path):
    line = make_site_key(tmp_path / "own")
    place = add_site(folder, "clinic-c", line + " somebody@somewhere\n", data={"path": "c.csv"})
    assert sorted(path.name for path in place.iterdir()) == ["ca.crt", "federation.toml", "node.pub", "site.toml"]
    assert read_roster(folder).sites["clinic-c"] == line
    assert list(read_roster(folder).sites) == ["clinic-a", "clinic-b", "clinic-c"]
    copies = {path.read_bytes() for path in folder.rglob("federation.toml")}
    assert len(copies) == 1
    with pytest.raises(UsageError, match=r"SHA256:.*it is the key of site 'clinic-c'"):
        add_site(folder, "clinic-d", line)


def test_a_site_that_takes_part_keeps_its_key_at_home(folder, tmp_path):
    place, old = folder / "sites" / "clinic-a", read_roster(folder).sites
    line = make_site_key(tmp_path / "own")
    for _ in range(2):  # the second time changes nothing
        assert add_site(folder, "clinic-a", line + " somebody@somewhere\n") == place
        assert read_roster(folder).sites == {"clinic-a": line, "clinic-b": old["clinic-b"]}
        assert not (place / "node.key").exists()
        assert (place / "node.pub").read_text() == line + "\n"
        assert len({path.read_bytes() for path in folder.rglob("federation.toml")}) == 1
    with pytest.raises(UsageError, match=r"it is the key of site 'clinic-a'"):
        add_site(folder, "clinic-b", line)


def test_a_new_key_in_the_sites_own_folder_on_this_machine_stays_there(folder):
    place = folder / "sites" / "clinic-a"
    (place / "node.key").unlink()
    line = make_site_key(place)
    add_site(folder, "clinic-a", line)
    assert line_of_key_file(place / "node.key") == line == read_roster(folder).sites["clinic-a"]


def test_a_site_that_takes_part_is_not_added_without_a_key(folder):
    with pytest.raises(UsageError, match=r"got 'clinic-a', which takes part already; .*--public-key"):
        add_site(folder, "clinic-a")


def test_a_key_is_made_for_a_site_that_brings_none(folder):
    place = add_site(folder, "clinic-c")
    assert line_of_key_file(place / "node.key") == read_roster(folder).sites["clinic-c"]
    with pytest.raises(UsageError, match="there already: the server knows this site by it"):
        make_site_key(place)


@pytest.mark.parametrize("name", ["clinic-a", "CLINIC-A", "a/b", "../x", ""])
def test_a_name_that_is_taken_or_cannot_be_one_is_refused(folder, name):
    before = files(folder)
    with pytest.raises(UsageError, match="sites: got"):
        add_site(folder, name)
    assert files(folder) == before


def test_a_key_that_is_none_adds_nothing(folder):
    before = (folder / "federation.toml").read_bytes(), files(folder)
    with pytest.raises(UsageError, match="expected one line that begins with ecdsa-sha2-nistp384"):
        add_site(folder, "clinic-c", "ssh-rsa AAAA")
    assert ((folder / "federation.toml").read_bytes(), files(folder)) == before


def test_a_site_is_taken_out_and_its_folder_kept(folder):
    (folder / "sites" / "clinic-a" / "precious").write_text("x")
    assert remove_site(folder, "clinic-a") == folder / "removed" / "clinic-a"
    assert (folder / "removed" / "clinic-a" / "precious").read_text() == "x"
    assert list(read_roster(folder).sites) == ["clinic-b"]
    with pytest.raises(UsageError, match=r"unknown site 'clinic-a'.*did you mean 'clinic-b'"):
        remove_site(folder, "clinic-a")
    add_site(folder, "clinic-a")
    assert remove_site(folder, "clinic-a") == folder / "removed" / "clinic-a.1"


def begin(folder, *names):
    """A run of these sites that has just begun."""
    (folder / "run").mkdir()
    zeros = (0,) * len(names)
    counts = {"groups": None, "num_train": zeros, "num_validation": zeros, "num_test": zeros}
    run = {"label": "fedmerge", "method": "fedmerge", "options": {}, "seed": 0, "status": "running", "versions": {}}
    facts = {"class_names": ("sick", "well"), "num_params": 8, "setting": "", "data_sha256": "0" * 64}
    write_run(folder / "run", RunRecord(client_names=names, **counts, **run, **facts))


def test_no_site_is_taken_out_of_a_run_that_has_begun(folder):
    begin(folder, "clinic-a", "clinic-b")
    before = files(folder)
    with pytest.raises(UsageError, match=r"run has begun with 'clinic-a'.*fedmerge deploy forget"):
        remove_site(folder, "clinic-a")
    assert [name for name in files(folder) if not name.endswith(".lock")] == before
    (folder / "run" / "run.json").unlink()
    remove_site(folder, "clinic-a")


def test_no_site_is_added_to_a_run_that_has_begun_and_one_that_was_can_be_taken_out(folder):
    begin(folder, "clinic-a", "clinic-b")
    before = files(folder)
    with pytest.raises(UsageError, match=r"has begun without 'clinic-c'.*fedmerge deploy offer"):
        add_site(folder, "clinic-c")
    assert files(folder) == before
    moved = (folder / "run").rename(folder.parent / "elsewhere")
    add_site(folder, "clinic-c")
    moved.rename(folder / "run")
    remove_site(folder, "clinic-c")
    assert set(read_roster(folder).sites) == {"clinic-a", "clinic-b"}


def test_comments_in_the_configuration_stay(folder):
    path = folder / "federation.toml"
    text = path.read_text().replace("rounds = 3", "rounds = 3  # enough").replace("[sites]\n", "[sites]\n# north:\n")
    path.write_text(text)
    add_site(folder, "clinic-c")
    assert remove_site(folder, "clinic-c") == folder / "removed" / "clinic-c"
    assert path.read_text() == text


NAMES = st.text("abc-.ü", min_size=1, max_size=3)
SITES = st.dictionaries(NAMES, st.text("xyz \"'#[]=", max_size=5), max_size=4)


@given(SITES, SITES, st.sampled_from(["", "\n[after]\nx = 1\n", "\n# end\n"]), st.booleans())
def test_another_table_of_sites_is_the_only_change(before, after, end, wide):
    text = "a = 1  # one\n[sites]  # these\n" + tomli_w.dumps(before) + end
    text = text if wide else tomli_w.dumps(tomllib.loads(text))
    changed = _text_with_sites(text, after)
    assert tomllib.loads(changed) == {**tomllib.loads(text), "sites": after}
    assert "# one" in changed or not wide


def test_the_compose_file_follows_unless_somebody_changed_it(tmp_path):
    yaml = pytest.importorskip("yaml")
    write_blueprint(tmp_path, blueprint())
    path = tmp_path / "compose.yaml"
    add_site(tmp_path, "clinic-c")
    assert [name for name in yaml.safe_load(path.read_text())["services"] if name.startswith("site-")] == [
        "site-1",
        "site-2",
        "site-3",
    ]
    path.write_text(path.read_text() + "# mine\n")
    changed = path.read_text()
    remove_site(tmp_path, "clinic-c")
    assert path.read_text() == changed


def test_a_new_certificate_is_for_the_same_hosts_and_the_same_authority(folder):
    before = describe(folder / "server.crt"), (folder / "ca.crt").read_bytes()
    after = renew_certificate(folder, days=200)
    assert after.hosts == before[0].hosts
    assert after.fingerprint != before[0].fingerprint
    assert 199 < after.days_left <= 200
    assert (folder / "ca.crt").read_bytes() == before[1]


def test_a_new_certificate_can_have_more_hosts(folder):
    assert renew_certificate(folder, days=9, hosts=["new.example.org", "10.1.2.3"]).hosts == (
        *("fed.example.org", "10.1.2.3", "localhost", "127.0.0.1"),
        "new.example.org",
    )


def test_without_its_authority_a_server_gets_no_certificate(folder, tmp_path):
    (folder / "ca.key").rename(tmp_path / "ca.key")
    before = (folder / "server.crt").read_bytes()
    with pytest.raises(UsageError, match=r"ca\.key is not there: .*put it back for this command"):
        renew_certificate(folder, days=200)
    assert (folder / "server.crt").read_bytes() == before
    insecure = write_blueprint(tmp_path / "i", blueprint(address="127.0.0.1:9092", insecure=True)).folder
    with pytest.raises(UsageError, match="without certificates"):
        renew_certificate(insecure, days=200)


def test_what_is_no_federation_is_told_apart(tmp_path):
    with pytest.raises(UsageError, match=r"it has no federation\.toml; make one with `fedmerge deploy init`"):
        read_roster(tmp_path)
    (tmp_path / "federation.toml").write_text("sites = 1\n[deploy]\nadress = 'x'\n")
    with pytest.raises(UsageError, match=r"(?s)did you mean 'address'.*sites: got 1; expected a table"):
        read_roster(tmp_path)


def test_the_compose_file_is_yaml_with_what_each_service_needs(written):
    yaml = pytest.importorskip("yaml")
    services = yaml.safe_load((written / "compose.yaml").read_text())["services"]
    assert list(services) == ["proxy", "server", "run", "site-1", "site-2"]
    assert services["proxy"]["ports"] == ["9092:9092"]
    assert services["proxy"]["networks"] == {"default": {"aliases": ["fed.example.org"]}}
    assert services["server"]["network_mode"] == services["run"]["network_mode"] == "service:proxy"
    assert "ports" not in services["server"]
    assert {name: service["restart"] for name, service in services.items()} == {
        **dict.fromkeys(("proxy", "server", "site-1", "site-2"), "always"),
        "run": "on-failure",
    }
    seen = ("nginx.conf", "ca.crt", "server.crt", "server.key")
    assert services["proxy"]["volumes"] == [
        *(f"./{name}:{written}/{name}:ro" for name in seen),
        f"./proxy:{written}/proxy",
    ]
    assert services["site-1"]["volumes"] == [f"./sites/clinic-a:{written}/sites/clinic-a"]
    assert all("healthcheck" in services[name] for name in ("proxy", "server"))
    compile(services["server"]["healthcheck"]["test"][-1], "health", "exec")


@given(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), max_size=30))
def test_any_text_survives_yaml_and_compose(text):
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load(units._yaml({"a": {"b": [text], "c": text}}))
    assert found == {"a": {"b": [text.replace("$", "$$")], "c": text.replace("$", "$$")}}


def test_systemd_accepts_every_unit(written, tmp_path):
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("needs systemd-analyze (Debian package systemd)")
    made = [
        *sorted((written / "systemd").iterdir()),
        write_site_unit(shutil.copytree(written / "sites", tmp_path / "s") / "clinic-a"),
    ]
    assert len(made) == 4
    for path in made:
        if "proxy" in path.name and shutil.which("nginx") is None:
            continue  # it says that the program is not there
        done = subprocess.run([analyze, "verify", path], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), path.name


def test_systemd_reads_words_with_spaces_and_specifiers(written, tmp_path):
    text = units.server_unit(tmp_path / "100% mine", tmp_path / "fed merge", "me")
    assert f'ExecStart="{tmp_path}/fed merge" deploy start server "{tmp_path}/100%% mine"\n' in text
    assert "Restart=always\n" in text
    assert "SuccessExitStatus=130\nRestart=on-failure\nRestartPreventExitStatus=2\n" in units.run_unit(
        tmp_path, tmp_path, "me"
    )
    text = units.site_unit(tmp_path / "100% mine", tmp_path / "fedmerge", "me")
    assert f'User=me\nExecStart={tmp_path}/fedmerge deploy start site "{tmp_path}/100%% mine"\nRestart=always\n' in text
    assert "CAP_NET_BIND_SERVICE" in units.proxy_unit(tmp_path, tmp_path, "me", port=443)
    assert "CAP_NET_BIND_SERVICE" not in units.proxy_unit(tmp_path, tmp_path, "me", port=9092)


def test_a_sites_unit_is_made_at_the_site_for_its_owner_and_never_for_root(written, tmp_path):
    place = tmp_path / "moved"
    shutil.copytree(written / "sites" / "clinic-a", place)
    path = write_site_unit(place)
    assert path == place / "fedmerge-site.service"
    assert f"{os.path.dirname(sys.executable)}/fedmerge deploy start site {place}\n" in path.read_text()
    assert "\nUser=root\n" not in path.read_text()
    if os.getuid() == 0:
        assert "\nUser=FILL_IN\n" in path.read_text()
        os.chown(place, 54321, -1)
        assert "\nUser=54321\n" in write_site_unit(place).read_text()
    with pytest.raises(UsageError, match=r"is no site: it has no site\.toml"):
        write_site_unit(tmp_path)


def test_nginx_accepts_its_configuration(written):
    nginx = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
    if nginx is None:
        pytest.skip("needs nginx (Debian package nginx-light)")
    command = [nginx, "-t", "-e", "stderr", "-c", written / "nginx.conf"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "[warn]" not in done.stderr


def test_a_forgotten_site_has_no_key_no_service_and_keeps_its_place(folder):
    place = folder
    text = (place / "federation.toml").read_text()
    (place / "federation.toml").write_text(f'{text}forgotten-1 = ""\n')
    roster = read_roster(place)
    assert "forgotten-1" not in roster.sites
    assert roster.forgotten == ("forgotten-1",)
    add_site(place, "late")
    assert read_roster(place).forgotten == ("forgotten-1",)
    with pytest.raises(UsageError, match="forgotten-2"):
        add_site(place, "forgotten-2")


def test_a_folder_that_was_moved_is_named_anew_but_in_what_somebody_has_changed(folder, written):
    unit = folder / "systemd/fedmerge-run.service"
    unit.write_text(unit.read_text() + "# ours\n")
    own = unit.read_text()
    assert write_derived(read_roster(folder)) == (written, ("systemd/fedmerge-run.service",))
    assert unit.read_text() == own
    unit.write_text("")
    app = tomllib.loads((folder / "app/pyproject.toml").read_text())
    assert app["tool"]["flwr"]["app"]["config"]["folder"] == str(folder)
    assert str(folder / "ca.crt") in (folder / "flower/config.toml").read_text()
    texts = [path.read_text() for path in (*folder.glob("systemd/*"), folder / "nginx.conf", folder / "compose.yaml")]
    assert sorted(str(folder) in text for text in texts) == [False, True, True, True, True]
    assert not any(str(written) in text for text in texts)
    assert write_derived(read_roster(folder)) is None


@pytest.mark.parametrize("name", ["a b", "50% off", "plain"])
def test_units_of_a_moved_folder_are_those_of_a_folder_that_was_made_there(folder, name):
    place = folder.rename(folder.parent / name)
    write_derived(read_roster(place))
    fresh = units.run_unit(place, own_program(), user_of(os.getuid()))
    assert (place / "systemd/fedmerge-run.service").read_text() == fresh


def test_flower_hears_of_another_address(folder):
    write_derived(read_roster(folder))
    path = folder / "federation.toml"
    path.write_text(path.read_text().replace('listen = "127.0.0.1:9093"', 'listen = "127.0.0.1:9555"'))
    assert write_derived(read_roster(folder)) is None
    assert "127.0.0.1:9555" in (folder / "flower/config.toml").read_text()
