"""Pairs of jax and flax that are known to break each other stop the import; all others pass."""

import subprocess
import sys

import pytest

from lmmr1_jax.runtime.versions import TESTED, broken_pair, check_versions, versions


@pytest.mark.parametrize(
    ("jax", "flax"),
    [("0.11.1", "0.12.8"), ("0.11.2", "0.12.9"), ("0.12.0", "0.12.9"), ("0.12.0.1", "0.12.8"), ("0.12.0rc1", "0.12.7")],
)
def test_pairs_seen_to_break_are_named(jax, flax):
    assert jax in broken_pair(jax, flax) and flax in broken_pair(jax, flax)


@pytest.mark.parametrize(
    ("jax", "flax"),
    [("0.10.2", "0.12.8"), ("0.12.0.1", "0.12.12"), ("0.11.1", "0.12.9"), ("0.11.0", "0.12.9"), ("0.13.0", "0.14.0")],
)
def test_tested_and_untried_pairs_pass(jax, flax):
    assert broken_pair(jax, flax) is None


def test_this_environment_passes_and_its_versions_are_reported():
    check_versions()
    assert {"python", "jax", "flax", "numpy"} <= set(versions())


def test_an_import_under_a_broken_pair_names_the_tested_ones(tmp_path):
    for package, version in (("jax", "0.11.2"), ("flax", "0.12.8")):
        folder = tmp_path / f"{package}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import lmmr1_jax"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: flax 0.12.8 can't be imported with jax 0.11.2") and TESTED in last


def test_importing_the_package_imports_no_jax():
    code = "import sys, lmmr1_jax; assert not {'jax', 'flax', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
