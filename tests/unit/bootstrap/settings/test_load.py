"""Settings come from options, the environment, `sandbox.toml` and defaults, in this order. Every error is reported."""

from pathlib import Path

import pytest

from sandbox.bootstrap.settings.keys import setting_keys
from sandbox.bootstrap.settings.load import ConfigurationError, load
from sandbox.bootstrap.settings.schema import ServerSettings
from sandbox.interfaces.server_services import Retention

COMPLETE_FILE = """
[server]
host = "0.0.0.0"
port = 1
ws_port = 2
data_dir = "/srv/sandbox"
runtime = "bubblewrap"
host_names = ["builds.example.org", "192.0.2.7"]
[capacity]
cpus = 1
memory = 1.5
disk = 0.5
[disk]
new_tasks_percent = 6
new_tasks_size = "5G"
output_percent = 3.5
output_size = "512M"
[git]
allowed_hosts = ["github.com", "*.example.org", "git.example.net:8443", "[2001:db8::1]:22"]
[secrets]
directory = "/etc/sandbox/secrets"
environment = ["GITHUB_TOKEN"]
[secrets.vault]
address = "https://vault.example.org:8200"
mount = "kv"
[preserve]
time_to_live = "90m"
[retention]
older_than = "unlimited"
keep = 0
max_bytes = "2T"
[access]
requests_per_minute = 0
[cluster]
engine = "processes"
host = "192.0.2.8"
port = 9000
listen_host = "0.0.0.0"
lease = "5m"
time_limit = "24h"
host_key_file = "/etc/sandbox-host.key"
[cluster.slurm]
partition = "long,gpu"
account = "ai"
options = ["--constraint=ssd", "--exclusive"]
sandbox = "/opt/sandbox/bin/sandbox"
data_dir = "/scratch/sandbox"
commands = "/opt/slurm/bin"
configuration = "/opt/slurm/etc/slurm.conf"
[cluster.kubernetes]
image = "registry.example/sandbox@sha256:0123"
namespace = "agents"
service_account = "worker"
node_selector = ["example.com/pool=agents"]
tolerations = ["example.com/agents"]
server = "https://192.0.2.9:6443/k8s"
token_file = "/etc/sandbox/token"
ca_file = "/etc/sandbox/ca.crt"
[log]
format = "json"
level = "debug"
"""


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Isolated configuration and data directories."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path


@pytest.fixture
def write_file(home):
    """Return a function that writes `sandbox.toml` at its default path."""

    def write(text: str) -> Path:
        file = home / "config" / "sandbox" / "sandbox.toml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    return write


def load_error(options=None, environment=None) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load(options or {}, environment or {})
    return caught.value.message


def test_unknown_runtime_error_lists_the_runtimes():
    message = load_error(environment={"SANDBOX_RUNTIME": "docker"})
    assert "server.runtime (SANDBOX_RUNTIME) must be auto, bubblewrap, gvisor or qemu" in message
    for name in ("auto", "bubblewrap", "gvisor", "qemu"):
        assert load({"runtime": name}, {}).settings.server.runtime == name


def test_defaults_apply_without_configuration(home):
    loaded = load({}, {})
    assert loaded.settings == ServerSettings()
    assert loaded.settings.server.data_dir == home / "data" / "sandbox"
    assert set(loaded.origins.values()) == {"default"}
    assert loaded.file is None


def test_each_key_can_be_set_in_the_file(write_file):
    file = write_file(COMPLETE_FILE)
    loaded = load({}, {})
    assert set(loaded.origins.values()) == {str(file)}
    settings, defaults = loaded.settings, ServerSettings()
    unchanged = [
        key.path for key in setting_keys() if loaded.value(key) == load({"config": "/dev/null"}, {}).value(key)
    ]
    assert unchanged == []
    assert settings.preserve.time_to_live_seconds == 5400
    assert settings.retention.retention == Retention(None, None, 2 * 1024**4)
    assert defaults.retention.retention == Retention(90 * 86_400, 10_000, None)
    assert settings.git.allowed_hosts[1] == "*.example.org"
    assert settings != defaults


def test_each_key_can_be_set_in_the_environment(write_file):
    by_file = load({"config": str(write_file(COMPLETE_FILE))}, {})
    texts = {}
    for key in setting_keys():
        value = by_file.value(key)
        texts[key.variable] = ",".join(value) if isinstance(value, tuple) else str(value)
    by_environment = load({"config": "/dev/null"}, texts)
    assert by_environment.settings == by_file.settings
    assert by_environment.origins == {key.path: key.variable for key in setting_keys()}


def test_options_take_precedence_over_environment_and_file_and_defaults(write_file):
    file = write_file("[server]\nport = 3\nws_port = 3\nhost = '::1'\n")
    loaded = load({"port": "1"}, {"SANDBOX_PORT": "2", "SANDBOX_WS_PORT": "2"})
    server = loaded.settings.server
    assert (server.port, server.ws_port, server.host, server.runtime) == (1, 2, "::1", "auto")
    assert [loaded.origins[f"server.{name}"] for name in ("port", "ws_port", "host", "runtime")] == [
        "--port", "SANDBOX_WS_PORT", str(file), "default",
    ]  # fmt: skip


def test_empty_variable_counts_as_unset(write_file):
    write_file("[server]\nport = 3\n")
    assert load({}, {"SANDBOX_PORT": "", "SANDBOX_CONFIG": ""}).settings.server.port == 3


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("host", "server.host (--host) must not be empty"),
        ("port", "server.port (--port) must be a whole number"),
        ("data_dir", "server.data_dir (--data-dir) must not be empty"),
        ("runtime", "server.runtime (--runtime) must be auto, bubblewrap, gvisor or qemu"),
    ],
)
def test_empty_option_is_an_error(option, message):
    assert load_error({option: ""}) == f"The configuration has an error: {message}."


def test_empty_file_name_is_an_error():
    assert load_error({"config": ""}) == "--config must not be empty."


def test_explicit_file_must_exist(home):
    for options, environment in (({"config": "/nowhere.toml"}, {}), ({}, {"SANDBOX_CONFIG": "/nowhere.toml"})):
        assert load_error(options, environment) == "Cannot read /nowhere.toml: No such file or directory."


def test_relative_path_is_resolved_relative_to_the_settings_file(home, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    file = home / "some.toml"
    file.write_text('[server]\ndata_dir = "here"\n[secrets]\ndirectory = "~/secrets"\n')
    settings = load({"config": str(file)}, {}).settings
    assert settings.server.data_dir == home / "here"
    assert settings.secrets.directory == Path("/home/me/secrets")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[server]\nprot = 1", "server.prot ({file}) is unknown (known: host, port, ws_port, data_dir, runtime, "
                               "host_names); did you mean 'port'?"),
        ("[capcity]\ncpus = 1", "capcity ({file}) is unknown (known: server, capacity, disk, git, secrets, "
                                "preserve, retention, access, cluster, log); did you mean 'capacity'?"),
        ("port = 1", "port ({file}) is unknown (known: server, capacity, disk, git, secrets, preserve, "
                     "retention, access, cluster, log)"),
        ("[secrets.vault]\ntoken = 'hvs.x'", (
            "secrets.vault.token ({file}) must not be set in a file; set VAULT_TOKEN in the server's environment"
        )),
        ("[access]\ntoken = 'sbx_x'", "access.token ({file}) is unknown (known: requests_per_minute); "
                                      "secrets must not be set here"),
        ("[server]\nport = '8122'", "server.port ({file}) must be a whole number"),
        ("[server]\nport = true", "server.port ({file}) must be a whole number"),
        ("[server]\nport = 1.5", "server.port ({file}) must be a whole number"),
        ("[server]\nport = 65536", "server.port ({file}) must be at most 65535"),
        ("[server]\nhost = ''", "server.host ({file}) must not be empty"),
        ("[server]\ndata_dir = ''", "server.data_dir ({file}) must not be empty"),
        ("[secrets]\ndirectory = ''", "secrets.directory ({file}) must not be empty"),
        ("[server]\ndata_dir = 1", "server.data_dir ({file}) must be a string"),
        ("[server]\ndata_dir = '~nosuchuser/x'", (
            "server.data_dir ({file}) starts with the home directory of an unknown user"
        )),
        ("[server]\nhost = 2026-01-29", "server.host ({file}) must be a string"),
        ("[server]\nhost_names = 'a.example'", "server.host_names ({file}) must be a list of strings"),
        ("[server]\nhost_names = ['a b']", "server.host_names.0 ({file}) must be a host name or an IP address"),
        ("server = 1", "server ({file}) must be a section"),
        ("[capacity]\ncpus = inf", "capacity.cpus ({file}) must be at most 1000"),
        ("[capacity]\ncpus = nan", "capacity.cpus ({file}) must be at most 1000"),
        ("[capacity]\ncpus = 0", "capacity.cpus ({file}) must be at least 0.1"),
        ("[git]\nallowed_hosts = ['https://github.com']", "git.allowed_hosts.0 ({file}) must be a host name, or '*.' "
                                                          "and a domain, with an optional ':port'"),
        ("[git]\nallowed_hosts = ['*']", "git.allowed_hosts.0 ({file}) must be a host name, or '*.' and a domain, with "
                                         "an optional ':port'"),
        ("[secrets]\nenvironment = ['A=B']", "secrets.environment.0 ({file}) must be an environment variable name"),
        ("[secrets.vault]\naddress = 'https://user:pass@vault'", "secrets.vault.address ({file}) must be http:// or "
                                                                 "https:// and a host, without credentials"),
        ("[preserve]\ntime_to_live = '1d'", "preserve.time_to_live ({file}) must be a whole number and a unit, such as "
                                            "90s, 15m or 24h"),
        ("[retention]\nmax_bytes = '10K'", "retention.max_bytes ({file}) must be 1 to 999999 with the unit M, G or T, "
                                            "such as 500M or 20G, or unlimited"),
        ("[retention]\nolder_than = '2 weeks'", "retention.older_than ({file}) must be 1 to 999999 with the unit s, m, "
                                                "h or d, such as 12h or 90d, or unlimited"),
        ("[cluster.slurm]\noptions = ['--uid=0']", "cluster.slurm.options.0 ({file}) must be one of the options "
         "--constraint, --exclude, --exclusive, --gres, --licenses, --nice, --nodelist, --qos, --reservation, --tmp, "
         "--wckey, as --name=value"),
        ("[cluster.slurm]\ndata_dir = 'a'", "cluster.slurm.data_dir ({file}) must be an absolute path without spaces"),
        ("[cluster.slurm]\npartition = 'a b'", "cluster.slurm.partition ({file}) must be a name, or several separated "
         "by commas"),
        ("[cluster.kubernetes]\nserver = 'http://a'", "cluster.kubernetes.server ({file}) must be https:// and a host, "
         "without credentials"),
        ("[cluster.kubernetes]\nnamespace = 'a/../b'", "cluster.kubernetes.namespace ({file}) must be a name of at "
         "most 63 lowercase letters, digits and hyphens"),
        ("[cluster.kubernetes]\nnode_selector = ['a b']", "cluster.kubernetes.node_selector.0 ({file}) must be a "
         "label, as key=value"),
        ("[cluster]\nlease = '29s'", "cluster.lease ({file}) must be at least 30s: a worker must reach the server "
                                     "again before its lease ends"),
        ("[cluster]\nlease = '1d'", "cluster.lease ({file}) must be a whole number and a unit, such as 90s, 15m or "
                                    "24h"),
        ("[log]\nformat = 'xml'", "log.format ({file}) must be text or json"),
        ("[retention]\nkeep = 10000001", "retention.keep ({file}) must be at most 10000000"),
        ("[access]\nrequests_per_minute = -1", "access.requests_per_minute ({file}) must be at least 0"),
    ],
)  # fmt: skip
def test_error_names_key_and_file(write_file, text, message):
    file = write_file(text)
    end = "" if message.endswith("?") else "."
    assert load_error() == f"The configuration has an error: {message.format(file=file)}{end}"


def test_all_errors_are_reported_with_their_sources(write_file):
    file = write_file("[server]\nport = 'x'\n[git]\nallowed = []\n")
    message = load_error(
        {"ws_port": "y"}, {"SANDBOX_CAPACITY_DISK": "lots", "SANDBOX_ACCESS_REQUESTS_PER_MINUTE": "-5"}
    )
    assert message.startswith("The configuration has 5 errors:\n")
    for expected in (
        f"server.port ({file}) must be a whole number",
        "server.ws_port (--ws-port) must be a whole number",
        "capacity.disk (SANDBOX_CAPACITY_DISK) must be a number",
        f"git.allowed ({file}) is unknown (known: allowed_hosts); did you mean 'allowed_hosts'?",
        "access.requests_per_minute (SANDBOX_ACCESS_REQUESTS_PER_MINUTE) must be at least 0",
    ):
        assert f"  {expected}" in message


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        ({"port": "9", "ws_port": "9"}, {}, "server.ws_port (--ws-port) must differ from server.port (--port)"),
        ({"port": "8121"}, {}, "server.ws_port must differ from server.port (--port)"),
        ({}, {"SANDBOX_WS_PORT": "8122"}, "server.ws_port (SANDBOX_WS_PORT) must differ from server.port"),
    ],
)
def test_identical_ports_for_both_listeners_are_an_error(options, environment, message):
    assert load_error(options, environment) == f"The configuration has an error: {message}."
    combined = load_error({**options, "runtime": "docker"}, environment)
    assert "has 2 errors" in combined
    assert f"  {message}" in combined


def test_port_0_may_be_used_twice():
    assert load({"port": "0", "ws_port": "0"}, {}).settings.server.ws_port == 0


def test_error_does_not_contain_the_value(write_file):
    write_file("[secrets.vault]\ntoken = 'hvs.very-secret'\n[server]\nport = 'hvs.very-secret'\n")
    assert "very-secret" not in load_error()


@pytest.mark.parametrize("content", [b"[server", b"\xff\xfe", b"a = " + b"[" * 100_000, b"#" * (1024 * 1024 + 1)])
def test_invalid_file_is_rejected_with_a_short_message(home, content):
    file = home / "bad.toml"
    file.write_bytes(content)
    message = load_error({"config": str(file)})
    assert str(file) in message
    assert len(message) < 400
