from __future__ import annotations

import pytest

from deco_jax.run import files

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("shared", [False, True])
def test_all_or_nothing(tmp_path, shared):
    path = tmp_path / "folder" / "file"
    with files.whole(path, shared=shared) as part:
        part.write_text("first")
        assert not path.exists()
    with pytest.raises(KeyError), files.whole(path, shared=shared) as part:
        raise KeyError(part.write_text("half"))
    assert path.read_text() == "first"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_two_at_once(tmp_path):
    path = tmp_path / "file"
    with files.whole(path, shared=True) as one, files.whole(path, shared=True) as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"  # the outer block ends last
    assert list(tmp_path.iterdir()) == [path]
