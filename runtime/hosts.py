"""The host names under which a server may be asked, which keeps pages of other sites from reaching it."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Container, Mapping
from http import HTTPStatus

#: Further host names of a server, separated by commas, such as a proxy's or a Space's own domain.
HOSTS_VARIABLE = "OTDRG_ALLOWED_HOSTS"
_THIS_MACHINE = frozenset({"127.0.0.1", "localhost", "::1"})
_ANY_ADDRESS = ("0.0.0.0", "::")
_HOST = re.compile(r"(?:\[(?P<address>[0-9a-f:.]+)\]|(?P<name>[^\s:/@\[\]]+))(?::\d{1,5})?", re.IGNORECASE)


class Hosts:
    """The host names of a server.

    The `Host` header of a browser that reached this server by DNS rebinding holds another name. An IP address cannot be
    rebound, so a server that listens on all addresses accepts all of them.

    Args:
        server_name: address that the server listens on.
    """

    def __init__(self, server_name: str):
        configured = os.environ.get(HOSTS_VARIABLE, "").lower().split(",")
        #: Set by the administrator or the Hub; a proxy may forward requests for them under another name.
        self.public = {name.strip() for name in [*configured, os.environ.get("SPACE_HOST", "").lower()]} - {""}
        self.own = _THIS_MACHINE | {server_name.lower().strip("[]")}
        self.any_address = server_name.strip("[]") in _ANY_ADDRESS
        if self.any_address:
            self.own |= {socket.gethostname().lower()}
        # There, the Hub's proxy decides which Space a name leads to.
        self.on_the_hub = "SPACE_ID" in os.environ

    def __contains__(self, header: str | None) -> bool:
        """Whether a `Host` header names this server; any port is allowed, because ssh may forward any."""
        name = _host_name(header)
        if name is None:
            return False
        if name in self.own or name in self.public or (self.on_the_hub and name.endswith(".hf.space")):
            return True
        return self.any_address and _is_address(name)

    def refusal(
        self, headers: Mapping[str, str], expected: str, origins: Container[str] = (), changes: bool = True
    ) -> tuple[HTTPStatus, str] | None:
        """Status and reason with which a request is refused; None if it may be answered.

        Args:
            headers: of the request.
            expected: which pages may ask, for the reason.
            origins: pages of other sites that may ask.
            changes: whether pages of other sites are refused at all.
        """
        if headers.get("host") not in self:
            return HTTPStatus.MISDIRECTED_REQUEST, (
                f"this server is not {headers.get('host', '')[:100]!r}: expected the address it was started with; "
                f"the variable {HOSTS_VARIABLE} adds others"
            )
        origin = headers.get("origin", "")
        if not changes or origin in origins or self.same_site(headers):
            return None
        asker = (origin or headers.get("sec-fetch-site", ""))[:100]
        return HTTPStatus.FORBIDDEN, f"this request comes from the page {asker!r}: expected {expected}"

    def same_site(self, headers: Mapping[str, str]) -> bool:
        """Whether a request comes from a page of this server, or from no web page."""
        origin = headers.get("origin")
        if origin is None:
            return headers.get("sec-fetch-site", "none") in ("none", "same-origin")
        host = origin.partition("://")[2].lower()
        return host == headers.get("host", "").lower() or _host_name(host) in self.public


def _host_name(header: str | None) -> str | None:
    """The name or address in a `Host` header, without the port."""
    match = _HOST.fullmatch(header or "")
    return (match["address"] or match["name"]).lower() if match else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


__all__ = ["HOSTS_VARIABLE", "Hosts"]
