"""Where compiled programs are kept, and that the environment has the last word."""

import sys

import jax
import pytest

from t2i_jax import compilation_cache


@pytest.fixture
def on_tpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    before = jax.config.jax_compilation_cache_dir  # the tests may have one of their own
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_below_the_home_of_the_user_alone(on_tpu, tmp_path):
    path = compilation_cache.enable({"HOME": str(tmp_path)})
    assert path == tmp_path / ".cache" / "t2i_jax" / "xla"
    assert jax.config.jax_compilation_cache_dir == str(path)
    assert path.stat().st_mode & 0o777 == 0o700
    assert compilation_cache.enable({"HOME": "elsewhere"}) is None  # there is one


def test_the_users_own_cache_directory(on_tpu, tmp_path):
    path = compilation_cache.enable({"XDG_CACHE_HOME": str(tmp_path), "HOME": "/nowhere"})
    assert path == tmp_path / "t2i_jax" / "xla"


@pytest.mark.parametrize("given", ["", "gs://bucket/programs"])
def test_the_environment_is_left_to_jax(on_tpu, given):
    assert compilation_cache.enable({"JAX_COMPILATION_CACHE_DIR": given}) is None
    assert jax.config.jax_compilation_cache_dir is None


def test_nowhere_to_write_is_no_error(on_tpu, tmp_path):
    (tmp_path / ".cache").write_text("a file")
    assert compilation_cache.enable({"HOME": str(tmp_path)}) is None
    assert compilation_cache.enable({}) is None
    assert jax.config.jax_compilation_cache_dir is None


def test_every_kind_of_cpu_has_its_own(on_tpu, monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(sys, "platform", "linux")
    kinds = []
    for i, text in enumerate(("flags\t: avx avx2", "Features : asimd", "flags : avx2 avx", "")):
        (info := tmp_path / str(i)).write_text(f"processor : 0\n{text}\nbugs : none\n")
        kinds.append(compilation_cache._kind_of_cpu(str(info)))
    assert kinds[0] == kinds[2] != kinds[1] and kinds[3] is None
    monkeypatch.setattr(compilation_cache, "_kind_of_cpu", lambda: kinds[0])
    path = compilation_cache.enable({"XDG_CACHE_HOME": str(tmp_path)})
    assert path == tmp_path / "t2i_jax" / "xla" / kinds[0]


def test_not_on_a_mac(on_tpu, monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert compilation_cache.enable({"HOME": str(tmp_path)}) is None
    assert list(tmp_path.iterdir()) == []
