import inspect
import re

import pytest

from floe.cli import packfs, packfs_worker, settings
from floe.cli.settings import KEYS, Settings, defaults_for, flag_name, load
from floe.cli.sizes import Size, format_seconds, format_size
from floe.store.errors import BadInputError


def write(tmp_path, text):
    path = tmp_path / "config.toml"
    path.write_text(text)
    return str(path)


@pytest.fixture(autouse=True)
def _no_machine_file(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "DEFAULT_CONFIG", str(tmp_path / "absent.toml"))


def test_defaults_are_the_documented_ones():
    found = load({}, {})
    assert found.store == "file:///var/lib/floe/store"
    assert found.index == "sqlite:/var/lib/floe/index.db"
    assert str(found.root) == "/var/lib/floe/snapshotter"
    assert str(found.cache_dir) == "/var/cache/floe"
    assert str(found.run_dir) == "/run/floe"
    assert str(found.socket) == "/run/floe/snapshotter.sock"
    assert found.cache_size.of(1000) == 800
    assert found.cache_min_free.of(1000) == 100
    assert found.prepare_timeout == 2.0
    assert found.on_store_error == "unpack"


def test_later_wins(tmp_path):
    config = write(tmp_path, 'store = "file:///from/file"\nrun_dir = "/from/file"\nroot = "/from/file"\n')
    environ = {"FLOE_STORE": "file:///from/environment", "FLOE_RUN_DIR": "/from/environment"}
    found = load({"store": "file:///from/flag"}, environ, config)
    assert found.store == "file:///from/flag"
    assert str(found.run_dir) == "/from/environment"
    assert str(found.root) == "/from/file"


def test_every_key_works_in_file_environment_and_flag(tmp_path):
    values = {
        "store": "s3://bucket/p?region=r",
        "index": "none",
        "root": "/a",
        "cache_dir": "/b",
        "cache_dirs": "/h:/i",
        "run_dir": "/c",
        "cache_size": "7MiB",
        "cache_min_free": "3%",
        "store_timeout": "7",
        "spool_dir": "/d",
        "workers": "3",
        "readahead": "5MiB",
        "read_deadline": "1.5",
        "fetch_memory": "9MiB",
        "busy_poll": "off",
        "profiles": "read",
        "completion": "idle",
        "completion_rate": "200MiB",
        "model_policy": '[{name = "llama/*", pin = true, share = "1GiB"}]',
        "image_policy": '[{name = "registry.example/*", never = true}]',
        "image_grace": "7d",
        "seed": "label",
        "seed_rate": "3MiB",
        "containerd_socket": "/s",
        "signing_key": "/k",
        "trusted_keys": "/keys,ed25519:x",
        "cache_bypass": "never",
        "address": "/e",
        "registry_config": "/f:/g",
        "prepare_timeout": "4",
        "on_store_error": "error",
        "prefetch_at_prepare": "6MiB",
        "mounter": "portable",
        "loop": "never",
        "kubelet_dir": "/h",
        "csi_rules": '[{namespace = "team-*", models = ["llama/*"]}]',
        "node_name": "n1.example",
        "node_labels": "zone=a,gpu",
        "heartbeat": "2.5",
        "warm_budget": "9GiB",
        "packfs_metrics": "none",
        "snapshotter_metrics": "127.0.0.1:1",
        "csi_metrics": "none",
        "agent_metrics": "unix:/m",
        "indexer_metrics": "unix:/n",
        "otlp_endpoint": "http://127.0.0.1:4318",
        "log_level": "debug",
        "log_format": "json",
    }
    assert set(values) == set(KEYS)
    by_flag = load(values, {})
    assert load({}, {f"FLOE_{key.upper()}": value for key, value in values.items()}) == by_flag
    assert load({}, {}, write(tmp_path, "".join(f"{k} = {v!r}\n" for k, v in values.items()))) == by_flag
    defaults = Settings()
    assert all(getattr(by_flag, key) != getattr(defaults, key) for key in KEYS)


def test_a_child_given_the_flags_has_the_same_settings():
    chosen = load({"cache_size": "12.5%", "readahead": "3MiB", "address": "/x/y.sock", "store": "file:///s"}, {})
    flags = dict(flag.removeprefix("--").split("=", 1) for flag in chosen.as_flags())
    assert flags.pop("config") == ""
    again = {key.replace("-", "_"): value for key, value in flags.items()}
    assert load(again, {"FLOE_NOTHING": "x"}, "") == chosen


def test_file_values_may_be_numbers(tmp_path):
    found = load({}, {}, write(tmp_path, "cache_size = 1048576\nworkers = 2\nprepare_timeout = 0.5\n"))
    assert found.cache_size == Size(bytes=1 << 20)
    assert (found.workers, found.prepare_timeout) == (2, 0.5)


def test_a_missing_default_file_is_fine_and_a_missing_chosen_one_is_not(tmp_path):
    load({}, {})
    missing = str(tmp_path / "missing.toml")
    with pytest.raises(BadInputError, match=r"missing\.toml"):
        load({}, {}, missing)
    with pytest.raises(BadInputError, match=r"missing\.toml"):
        load({}, {"FLOE_CONFIG": missing})


def test_an_empty_config_means_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "DEFAULT_CONFIG", write(tmp_path, "broken = ["))
    with pytest.raises(BadInputError, match="TOML"):
        load({}, {})
    load({}, {}, "")


def test_unknown_keys_are_refused_by_name_with_the_nearest_known_one(tmp_path):
    with pytest.raises(BadInputError, match="'cache_sise'") as caught:
        load({}, {}, write(tmp_path, 'cache_sise = "1GiB"\n'))
    assert "'cache_size'" in caught.value.hint
    with pytest.raises(BadInputError, match="'frobnicate'"):
        load({}, {}, write(tmp_path, "[frobnicate]\nx = 1\n"))


def test_a_mistyped_variable_is_refused_and_a_foreign_one_is_not():
    with pytest.raises(BadInputError, match="FLOE_STROE") as caught:
        load({}, {"FLOE_STROE": "file:///x"})
    assert "FLOE_STORE" in caught.value.hint
    kubernetes = {"FLOE_SERVICE_HOST": "10.0.0.1", "FLOE_PORT_80_TCP_ADDR": "10.0.0.1", "FLOE_STORE_PORT": "tcp://x"}
    assert load({}, kubernetes) == Settings()


def test_an_empty_variable_is_no_setting():
    assert load({}, {"FLOE_STORE": "", "FLOE_CONFIG": ""}) == Settings()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cache_size", "101%"),
        ("cache_size", "12 parsecs"),
        ("cache_size", "-1"),
        ("cache_size", True),
        ("cache_min_free", ""),
        ("readahead", "10%"),
        ("workers", "0"),
        ("workers", 1.5),
        ("prepare_timeout", "soon"),
        ("prepare_timeout", 0),
        ("prepare_timeout", "nan"),
        ("read_deadline", float("inf")),
        ("on_store_error", "panic"),
        ("log_level", "loud"),
        ("store", ["a"]),
        ("store", "file://relative/path"),
        ("index", "sqlite:relative.db"),
        ("root", 5),
    ],
)
def test_a_bad_value_names_where_it_stands(key, value, tmp_path):
    with pytest.raises(BadInputError, match=f"^--{flag_name(key)}: "):
        load({key: value}, {})
    if isinstance(value, str) and value:
        with pytest.raises(BadInputError, match=f"^FLOE_{key.upper()}: "):
            load({}, {f"FLOE_{key.upper()}": value})
        config = write(tmp_path, f"{key} = {value!r}\n")
        with pytest.raises(BadInputError, match=f"^{key} in .*config.toml: "):
            load({}, {}, config)


def test_relative_paths_become_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert load({"cache_dir": "cache"}, {}).cache_dir == tmp_path / "cache"


def test_what_is_derived_follows_the_directories():
    found = load({"run_dir": "/r", "cache_dir": "/c"}, {})
    assert str(found.socket) == "/r/snapshotter.sock"
    assert str(found.spool) == "/c/spool"
    assert found.metrics("packfs") == "unix:/r/packfs-metrics.sock"
    assert load({"packfs_metrics": "none"}, {}).metrics("packfs") is None


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("512", 512), ("1KiB", 1024), ("1.5 MiB", 3 << 19), ("2gib", 2 << 30), ("1TiB", 1 << 40), ("9B", 9)],
)
def test_sizes(text, count):
    assert Size.parse(text).of(0) == count


@pytest.mark.parametrize("text", ["1KB", "1 M", "KiB", "1KiB1", "0x10", "1,5MiB", "%", "\u0663"])
def test_bad_sizes(text):
    with pytest.raises(BadInputError):
        Size.parse(text)


def test_sizes_and_spans_for_people():
    assert [format_size(n) for n in (0, 999, 1000, 1536, 1 << 20, 150 << 20, 4 << 40)] == [
        "0 B",
        "999 B",
        "0.98 KiB",
        "1.50 KiB",
        "1.00 MiB",
        "150 MiB",
        "4.00 TiB",
    ]
    assert [format_seconds(s) for s in (0.44, 12.3, 200, 18120)] == ["0.4 s", "12 s", "3 min 20 s", "5 h 2 min"]


def test_a_user_who_is_not_root_has_directories_of_their_own():
    assert defaults_for(0, {"HOME": "/home/u", "XDG_CACHE_HOME": "/x"}) == Settings()
    found = load({}, {}, defaults=defaults_for(1000, {"HOME": "/home/u"}))
    assert (str(found.cache_dir), str(found.run_dir)) == ("/home/u/.cache/floe/node", "/home/u/.cache/floe/run")
    assert found.index == "sqlite:/home/u/.cache/floe/index.db"
    assert found.store == Settings().store
    xdg = {"HOME": "/home/u", "XDG_CACHE_HOME": "/c", "XDG_RUNTIME_DIR": "/r", "FLOE_INDEX": "none"}
    found = load({"cache_dir": "/given"}, {"FLOE_INDEX": "none"}, defaults=defaults_for(1000, xdg))
    assert (str(found.cache_dir), str(found.run_dir), found.index) == ("/given", "/r/floe", "none")


def test_cache_directories_are_a_list_or_one_line_and_each_is_named_once(tmp_path):
    found = load({}, {}, write(tmp_path, 'cache_dir = "/a"\ncache_dirs = ["/b", "/c"]\n'))
    assert list(map(str, found.cache_roots)) == ["/a", "/b", "/c"]
    assert load({"cache_dir": "/a"}, {"FLOE_CACHE_DIRS": "/b:/c"}).cache_roots == found.cache_roots
    assert "--cache-dirs=/b:/c" in found.as_flags("cache_dirs")
    assert "--cache-dirs=none" in Settings().as_flags("cache_dirs")
    assert load({}, {}, write(tmp_path, "cache_dirs = []\n")).cache_roots == Settings().cache_roots
    with pytest.raises(BadInputError, match="/a is named twice"):
        _ = load({"cache_dir": "/a", "cache_dirs": "/b:/a"}, {}).cache_roots
    for wrong in ('["b"]', '["/b:/c"]', "[1]", '"b"'):
        with pytest.raises(BadInputError, match="cache_dirs"):
            load({}, {}, write(tmp_path, f"cache_dirs = {wrong}\n"))


def test_a_worker_has_all_settings_that_it_goes_by(tmp_path, monkeypatch):
    """The keeper starts it by flags alone: what is in the settings file must be among them."""
    started = []
    for name in ("ARENA_MAX", "MMAP_THRESHOLD_", "TRIM_THRESHOLD_"):
        monkeypatch.setenv(f"MALLOC_{name}", "1")
    monkeypatch.setattr(packfs.os, "chdir", lambda _: None)
    monkeypatch.setattr(packfs.os, "execv", lambda _, argv: started.append(argv))
    chosen = load({}, {}, write(tmp_path, 'store_timeout = 7.5\ncompletion = "idle"\nread_deadline = 9\n'))
    packfs._become_keeper(chosen, force=False)
    (argv,) = started
    flags = dict(flag.removeprefix("--").split("=", 1) for flag in argv[argv.index("--worker") + 1 :])
    assert flags.pop("config") == ""
    worker = load({flag.replace("-", "_"): value for flag, value in flags.items()}, {}, "")
    assert (worker.store_timeout, worker.completion, worker.read_deadline) == (7.5, "idle", 9)
    source = inspect.getsource(packfs_worker)
    used = set(re.findall(r"settings\.([a-z_]+)", source)) & set(KEYS)
    assert {"store", "store_timeout", "read_deadline"} <= used <= set(packfs.WORKER_KEYS)
