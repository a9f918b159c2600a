"""Texts that keep a federation running: units for systemd, a compose file, and the proxy in front of the SuperLink.

The SuperLink answers everybody who has ``ca.crt`` on all of its interfaces, also on the one that starts runs and lets
sites in; only the one for sites (``/v1/fleet/``) asks for keys. So it listens on the loopback address, and the proxy
is the door: it passes that one interface and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedmerge._version import __version__
from fedmerge.core.errors import UsageError
from fedmerge.core.text import brief
from fedmerge.deploy.address import host_and_port, is_ip, is_loopback, local_address
from fedmerge.deploy.identity import CA, SERVER, SERVER_KEY

_HARDENING = """\
NoNewPrivileges=true
ProtectSystem=full
ProtectKernelTunables=true
ProtectKernelModules=true
ProtectControlGroups=true
RestrictSUIDSGID=true
LockPersonality=true
UMask=0077"""
"""Nothing here stands in the way of an accelerator, of compiled kernels, or of data and folders anywhere."""
_UNSAFE = frozenset("\"'\\$`:")


def check_path(path: Path) -> Path:
    """A folder's absolute path, if it can stand in the texts of this module and in Flower's own arguments.

    Raises:
        UsageError: if it cannot.
    """
    absolute = path.absolute()
    if not str(absolute).isprintable() or _UNSAFE & set(str(absolute)):
        raise UsageError(
            f"got the folder {brief(str(absolute))}; expected a path without quotes, colons, $, ` and \\, and "
            "without characters that cannot be seen"
        )
    return absolute


def server_unit(folder: Path, program: Path, user: str) -> str:
    """A unit that keeps the SuperLink running.

    Args:
        folder: The federation's.
        program: The command ``fedmerge``.
        user: Who owns the folder.
    """
    return _unit(
        "SuperLink of a fedmerge federation",
        [program, "deploy", "start", "server", check_path(folder)],
        restart="always",
        user=user,
    )


def run_unit(folder: Path, program: Path, user: str) -> str:
    """A unit that trains until all rounds are done, and goes on from the checkpoint after whatever stopped it.

    It does not start again after exit status 2: then the request itself is wrong. Stopped, it stops the run and ends
    with status 130, as after Ctrl-C.
    """
    return _unit(
        "Training of a fedmerge federation",
        [program, "deploy", "run", check_path(folder)],
        restart="on-failure",
        user=user,
        after="fedmerge-server.service",
        more=["SuccessExitStatus=130"],
    )


def proxy_unit(folder: Path, nginx: Path, user: str, *, port: int) -> str:
    """A unit that keeps the proxy running."""
    low = ["AmbientCapabilities=CAP_NET_BIND_SERVICE"] if port < 1024 else []
    return _unit(
        "Proxy of a fedmerge federation",
        [nginx, "-e", "stderr", "-c", check_path(folder) / "nginx.conf"],
        restart="always",
        user=user,
        more=["ExecReload=/bin/kill -HUP $MAINPID", *low],
    )


def site_unit(folder: Path, program: Path, user: str | None) -> str:
    """A unit that keeps the SuperNode of a site running.

    A SuperNode may end with status 0 when the server goes away, so it starts again whatever the status.

    Args:
        folder: The site's, on its machine.
        program: The command ``fedmerge`` there.
        user: Who owns the folder. None leaves it open, and the unit does not start before somebody has filled it in:
            what the server sends runs as this user.
    """
    return _unit(
        "SuperNode of a fedmerge federation",
        [program, "deploy", "start", "site", check_path(folder)],
        restart="always",
        user=user or NOBODY,
    )


NOBODY = "FILL_IN"
"""In the place of a user that must be named before a unit starts."""


def _unit(
    description: str,
    command: Sequence[Path | str],
    *,
    restart: str,
    user: str,
    after: str = "",
    more: Sequence[str] = (),
) -> str:
    words = " ".join(_systemd_word(word) for word in command)
    others = " ".join(["network-online.target", *([after] if after else [])])
    prevent = "\nRestartPreventExitStatus=2" if restart == "on-failure" else ""
    return f"""[Unit]
Description={description}
Wants={others}
After={others}
StartLimitIntervalSec=0

[Service]
Type=exec
User={user}
ExecStart={words}
{"".join(line + chr(10) for line in more)}Restart={restart}{prevent}
RestartSec=15
TimeoutStopSec=60
{_HARDENING}

[Install]
WantedBy=multi-user.target
"""


def _systemd_word(word: Path | str) -> str:
    """A word of a command; texts may hold specifiers, paths do not."""
    text = str(word).replace("%", "%%") if isinstance(word, Path) else word
    return f'"{text}"' if set(text) & set(" ;\t") else text


def nginx_text(folder: Path, address: str, listen: str, *, largest_request: int) -> str:
    """A configuration for nginx that is complete: ``nginx -e stderr -c FOLDER/nginx.conf`` runs it in the foreground.

    Args:
        folder: The federation's; has the certificates and an empty folder ``proxy``.
        address: ``host:port`` that sites connect to.
        listen: ``host:port`` of the SuperLink.
        largest_request: MiB. Flower cuts tensors into pieces of 5 MB, each a request of its own.

    Raises:
        UsageError: if a path or an address cannot be written down.
    """
    place = check_path(folder)
    host, port = host_and_port(address)
    public = f"[::]:{port}" if ":" in host else str(port)
    temporary = "\n".join(
        f'    {kind}_temp_path "{place}/proxy/{kind}";' for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    return f"""# The door of a federation: what sites need of the SuperLink passes, everything else is refused.
daemon off;
pid "{place}/proxy/nginx.pid";
error_log stderr warn;
worker_processes auto;

events {{
    worker_connections 1024;
}}

http {{
    access_log off;
    server_tokens off;
{temporary}
    limit_conn_zone $binary_remote_addr zone=sites:1m;

    upstream superlink {{
        server {local_address(listen)};
        keepalive 16;
    }}

    server {{
        listen {public} ssl;
        ssl_certificate "{place}/{SERVER}";
        ssl_certificate_key "{place}/{SERVER_KEY}";
        ssl_protocols TLSv1.2 TLSv1.3;
        ssl_session_tickets off;

        limit_conn sites 256;
        client_max_body_size {largest_request}m;
        client_header_timeout 30s;
        client_body_timeout 60s;
        send_timeout 60s;
        keepalive_timeout 75s;

        location / {{
            return 403;
        }}

        # The path was made plain (no dots, nothing escaped) before it is compared; what was compared is passed on.
        location ~ ^/v1/fleet/[A-Za-z0-9/_-]+$ {{
            limit_except POST {{
                deny all;
            }}
            proxy_pass https://superlink$uri;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host localhost;
            proxy_ssl_verify on;
            proxy_ssl_trusted_certificate "{place}/{CA}";
            proxy_ssl_name localhost;
            proxy_ssl_server_name on;
            proxy_ssl_protocols TLSv1.2 TLSv1.3;
            proxy_request_buffering off;
            proxy_buffering off;
            proxy_connect_timeout 10s;
            proxy_send_timeout 120s;
            proxy_read_timeout 120s;
        }}
    }}
}}
"""


def compose_text(folder: Path, address: str, listen: str, sites: Sequence[str]) -> str:
    """A compose file with the server, its proxy, the training and all sites on one machine.

    Sites on machines of their own take their one service with them. A site sees its own folder and no other, the
    proxy what it needs to read and no other key than the server's.

    Args:
        folder: The federation's; the file lies in it.
        address: ``host:port`` that sites connect to.
        listen: ``host:port`` of the SuperLink, which its proxy alone can reach.
        sites: Their names.

    Raises:
        UsageError: if a path or an address cannot be written down.
    """
    place = str(check_path(folder))
    host, port = host_and_port(address)
    aliases: Mapping[str, object] = {} if is_ip(host) or is_loopback(host) else {"aliases": [host]}
    shared = {"restart": "always", "volumes": [f".:{place}"]}
    files = [f"./{name}:{place}/{name}:ro" for name in ("nginx.conf", CA, SERVER, SERVER_KEY)]
    inside = {"network_mode": "service:proxy"}
    services: dict[str, Mapping[str, object]] = {
        "proxy": {
            "image": "nginx:stable-alpine",
            "restart": "always",
            "volumes": [*files, f"./proxy:{place}/proxy"],
            "command": ["nginx", "-e", "stderr", "-c", f"{place}/nginx.conf"],
            "ports": [f"{port}:{port}"],
            "networks": {"default": aliases},
            "healthcheck": _health(["CMD", "nc", "-z", "127.0.0.1", str(port)]),
        },
        "server": {
            **_built(),
            **shared,
            **inside,
            "command": ["fedmerge", "deploy", "start", "server", place],
            "depends_on": {"proxy": {"condition": "service_started"}},
            "healthcheck": _health(["CMD", "python", "-c", _ASK_HEALTH.format(place, local_address(listen))]),
        },
        "run": {
            **_built(),
            **shared,
            **inside,
            "restart": "on-failure",
            "command": ["fedmerge", "deploy", "run", place],
            "depends_on": {"server": {"condition": "service_healthy"}},
        },
    }
    for number, name in enumerate(sites, start=1):
        own = f"{place}/sites/{name}"
        services[f"site-{number}"] = {
            **_built(),
            "restart": "always",
            "command": ["fedmerge", "deploy", "start", "site", own],
            "volumes": [f"./sites/{name}:{own}"],
            "depends_on": {"server": {"condition": "service_healthy"}},
        }
    return _COMPOSE_HEAD + _yaml({"services": services})


_COMPOSE_HEAD = """\
# docker compose up --build --detach
# FEDMERGE_IMAGE names another image that has the command fedmerge with its extra [flower].
# Server and training share the network of the proxy, which alone can be reached from outside.
# A site's data outside its folder is one more volume of its service. Sites on other machines: copy folder and service.
"""
_DOCKERFILE = f"""\
FROM python:3.12-slim
RUN pip install --no-cache-dir "fedmerge[flower]=={__version__}"
"""
_ASK_HEALTH = (
    "import ssl, urllib.request as u; "
    "u.urlopen('https://{1}/health', timeout=5, context=ssl.create_default_context(cafile='{0}/ca.crt'))"
)


def _built() -> dict[str, object]:
    image = f"${{FEDMERGE_IMAGE:-fedmerge:{__version__}}}"
    return {"image": _Verbatim(image), "build": {"dockerfile_inline": _DOCKERFILE}}


def _health(test: Sequence[str]) -> dict[str, object]:
    return {"test": list(test), "interval": "15s", "timeout": "10s", "retries": 4, "start_period": "30s"}


class _Verbatim(str):
    """A text in which compose itself puts values."""

    __slots__ = ()


def _yaml(value: object, depth: int = 0) -> str:
    """Tables, lists of texts and plain values as YAML: keys are words of ours, texts as JSON writes them."""
    indent = "  " * depth
    if isinstance(value, Mapping) and value:
        return "".join(f"{indent}{key}:{_yaml_value(part, depth)}" for key, part in value.items())
    if isinstance(value, list) and value:
        return "".join(f"{indent}- {_yaml_scalar(part)}\n" for part in value)
    return f"{indent}{_yaml_scalar(value)}\n"


def _yaml_value(value: object, depth: int) -> str:
    nested = isinstance(value, (Mapping, list)) and value
    return "\n" + _yaml(value, depth + 1) if nested else f" {_yaml_scalar(value)}\n"


def _yaml_scalar(value: object) -> str:
    plain = value.replace("$", "$$") if isinstance(value, str) and not isinstance(value, _Verbatim) else value
    return json.dumps(plain, ensure_ascii=False)
