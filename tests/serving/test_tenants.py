"""API keys: only hashes are kept, and only the whole key opens."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctxcomp_rag.errors import InputError
from ctxcomp_rag.serving.server import require_keys_outside
from ctxcomp_rag.serving.tenants import LOCAL_TENANT, Tenants, new_key


def test_a_key_opens_for_its_tenant_only() -> None:
    (first, line), (second, other) = new_key("acme"), new_key("other")
    tenants = Tenants(["# ours", "", line, other])
    assert [tenants.tenant_of(f"Bearer {key}") for key in (first, second)] == ["acme", "other"]
    assert tenants.tenant_of(f"bearer  {first}") == "acme"
    for wrong in (None, "", "Bearer", "Bearer ", f"Bearer {first[:-1]}", f"Bearer {first}x", f"Basic {first}", first,
                  f"Bearer {line.split(':')[1]}"):
        assert tenants.tenant_of(wrong) is None


def test_a_tenant_may_have_several_keys() -> None:
    (first, a), (second, b) = new_key("acme"), new_key("acme")
    assert {Tenants([a, b]).tenant_of(f"Bearer {key}") for key in (first, second)} == {"acme"}


def test_no_key_is_kept_as_it_is() -> None:
    key, line = new_key("acme")
    assert key not in line
    assert key not in repr(vars(Tenants([line])))


def test_without_keys_everybody_here_is_the_local_tenant() -> None:
    assert Tenants().tenant_of(None) == LOCAL_TENANT
    for host in ("127.0.0.1", "::1", "localhost"):
        require_keys_outside(host, Tenants())
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(InputError, match="without API keys the server is for this machine only"):
            require_keys_outside(host, Tenants())
        require_keys_outside(host, Tenants([new_key("acme")[1]]))


def test_a_keys_file_that_is_no_keys_file_is_refused_without_repeating_it(tmp_path: Path) -> None:
    key, line = new_key("acme")
    (tmp_path / "keys").write_text(f"{line}\nacme {key}\n")
    with pytest.raises(InputError, match="line 2 of the API keys") as error:
        Tenants.from_file(tmp_path / "keys")
    assert key not in str(error.value)
    (tmp_path / "none").write_text("# nobody\n")
    with pytest.raises(InputError, match="holds no API key"):
        Tenants.from_file(tmp_path / "none")


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "../x"])
def test_a_tenant_has_a_plain_name(name: str) -> None:
    with pytest.raises(InputError, match="expected a tenant's name"):
        new_key(name)
