"""Embedding stores and person tables: what is written comes back, and what does not fit is refused in one line."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from engine.audit import Pool
from engine.audit.store import SCHEMA, check_sides, is_store, read_people, read_store, with_people, write_store
from engine.errors import InputError, UsageError

META = {"schema": SCHEMA, "kind": "features"}


def features(n=6, **more):
    rows = np.random.default_rng(0).standard_normal((n, 4)).astype(np.float32)
    return Pool("features", rows, np.array([f"p{i // 2}" for i in range(n)]), **more)


def test_what_is_written_comes_back(tmp_path):
    rng = np.random.default_rng(1)
    mirrored = features().data[None, :, ::-1].copy()
    bits = rng.integers(0, 2**63, (5, 2), dtype=np.uint64)
    bits[:, 1] &= np.uint64(2**36 - 1)
    person = np.array(["ä b", "c,d", "e", "e", "f"])
    for name, pool in (
        ("f", features(group=np.array(["x", "y"] * 3), views=mirrored)),
        ("b", Pool("bits", bits, person, length=100, position_bp=np.arange(100) * 7)),
        ("plain", Pool("bits", bits, person, length=100)),
    ):
        folder = write_store(pool, tmp_path / name)
        assert is_store(folder)
        back = read_store(folder, "train")
        assert (back.kind, back.length) == (pool.kind, pool.length)
        for field in ("data", "person", "group", "views", "position_bp"):
            given, found = getattr(pool, field), getattr(back, field)
            assert (given is None) == (found is None), field
            assert given is None or np.array_equal(given, found), field
        with pytest.raises(UsageError, match="does not exist yet"):
            write_store(pool, folder)
    assert not is_store(tmp_path)


def test_a_file_with_its_table_beside_it(tmp_path):
    save_file({"features": features().data}, tmp_path / "a.safetensors", metadata=META)
    assert read_store(tmp_path / "a.safetensors").people == 6  # synthetic rows are people of their own
    with pytest.raises(InputError, match=r"a\.people\.tsv: expected a table that says whose the rows are"):
        read_store(tmp_path / "a.safetensors", "train")
    lines = [f"{i},q{i // 3},{'train' if i else ''}" for i in (3, 1, 0, 2, 5, 4)]  # any order
    (tmp_path / "a.people.tsv").write_text("\n".join(["Row,Person,Split", *lines]))
    assert read_store(tmp_path / "a.safetensors", "train").person.tolist() == ["q0"] * 3 + ["q1"] * 3
    with pytest.raises(InputError, match="only holdout in --holdout, got 5 of other sides"):
        read_store(tmp_path / "a.safetensors", "holdout")
    (tmp_path / "a.people.tsv").write_text("row\tperson\n0\tx\n7\ty\n")
    with pytest.raises(InputError, match="5 rows missing and 1 unknown"):
        read_store(tmp_path / "a.safetensors", "train")


@pytest.mark.parametrize(
    ("tensors", "metadata", "says"),
    [
        ({"features": np.zeros((3, 2), np.float32)}, {}, "schema"),
        ({"features": np.zeros((3, 2), np.float64)}, META, "expected F32 with 2 axes, got F64"),
        ({"features": np.zeros(3, np.float32)}, META, "2 axes"),
        ({"vectors": np.zeros((3, 2), np.float32)}, META, "vectors"),
        ({"features": np.zeros((3, 2), np.float32), "extra": np.zeros(1, np.float32)}, META, "extra"),
        ({"features": np.zeros((3, 2), np.float32), "views": np.zeros((1, 2, 2), np.float32)}, META, "views of shape"),
        ({"features": np.full((3, 2), np.nan, np.float32)}, META, "3 rows with NaN"),
        ({"features": np.zeros((3, 2), np.float32)}, {**META, "length": "5"}, "no sites"),
        ({"bits": np.zeros((3, 2), np.uint64)}, META, "length of 1 to 128 sites"),
        ({"bits": np.zeros((3, 2), np.uint64)}, {**META, "length": "129"}, "length of 1 to 128"),
        ({"bits": np.full((3, 2), 2**40, np.uint64)}, {**META, "length": "100"}, "zeros behind the 100 sites"),
        (
            {"bits": np.zeros((3, 2), np.uint64), "position_bp": np.zeros(9, np.int64)},
            {**META, "length": "100"},
            "positions",
        ),
    ],
)
def test_stores_that_do_not_fit_are_refused(tmp_path, tensors, metadata, says):
    save_file(tensors, tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(InputError, match=says):
        read_store(tmp_path / "a.safetensors")


def test_damaged_and_absent_files_are_refused(tmp_path):
    save_file({"features": features().data}, tmp_path / "a.safetensors", metadata=META)
    whole = (tmp_path / "a.safetensors").read_bytes()
    for name, content in (("cut", whole[:-5]), ("noise", b"\xff" * 64), ("empty", b""), ("long", whole + b"abc")):
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        with pytest.raises(InputError, match="a safetensors file"):
            read_store(tmp_path / f"{name}.safetensors")
    with pytest.raises(InputError, match="nothing there"):
        read_store(tmp_path / "none.safetensors")


def table(tmp_path, text):
    path = tmp_path / "people.csv"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "an empty file"),
        ("name,person\na,b\n", "a column 'id'"),
        ("id,whom\na,b\n", "a column 'person'"),
        ("id,person\na,b\na,c\n", "line 3: expected an id that occurs once, and its person, got 'a' twice"),
        ("id,person\na,\n", "id 'a' and person ''"),
        ("id,person\na,b,c\n", "line 2: expected 2 columns, got 3"),
        ('id,person\n"a,b\n', "a table"),
        ("id,person,split\na1,A,train\na2,A,holdout\nb,B,train\n", "1 on several .A: a2 in holdout and a1 in train"),
    ],
)
def test_tables_that_do_not_fit_are_refused(tmp_path, text, says):
    with pytest.raises(InputError, match=says):
        read_people(table(tmp_path, text))


def test_other_bytes_are_no_table(tmp_path):
    (tmp_path / "x.tsv").write_bytes(b"id\tperson\n\xff\xfe\ta\n")
    with pytest.raises(InputError, match="UTF-8"):
        read_people(tmp_path / "x.tsv")
    with pytest.raises(InputError, match="nothing there"):
        read_people(tmp_path / "y.tsv")


def test_ids_become_people_and_pairs_on_both_sides_are_named(tmp_path):
    people = read_people(table(tmp_path, "sample,person,group\nx1,X,n\nx2,X,n\ny1,Y,s\nz1,Z,s\n"))
    rows = np.zeros((3, 2), np.float32)
    pool = Pool("features", rows, np.array(["x1", "x2", "y1"]))
    mapped = with_people(pool, people, "train")
    assert mapped.person.tolist() == ["X", "X", "Y"]
    assert mapped.group.tolist() == ["n", "n", "s"]
    strange = Pool("features", rows, np.array(["x1", "new", "other"]))
    with pytest.raises(InputError, match=r"2 without a person \(new, other\)"):
        with_people(strange, people, "train")
    kept = with_people(strange, people, "synthetic", required=False)
    assert kept.person.tolist() == ["X", "synthetic new", "synthetic other"]
    assert kept.group is None
    check_sides({"train": np.array(["x1", "x2"]), "holdout": np.array(["y1", "z1"])}, people)
    with pytest.raises(InputError, match=r"1 pairs \(x1 in train and x2 in holdout are X\)"):
        check_sides({"train": np.array(["x1", "z1"]), "holdout": np.array(["x2", "y1"])}, people)


def test_ids_that_would_break_the_table_are_not_written(tmp_path):
    pool = Pool("features", np.zeros((1, 2), np.float32), np.array(["a\tb"]))
    with pytest.raises(InputError, match="without tabs"):
        write_store(pool, tmp_path / "s")
    assert not (tmp_path / "s").exists()
