"""data_loaders.graduate_admissions: where the table is looked for, what is refused, and what the surrogate is like."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from suite_cases import TABLE_HEADER, table_lines

from data_loaders import graduate_admissions
from data_loaders.graduate_admissions import COLUMNS, CORRELATIONS, load, split, surrogate

SHA256 = "9cdfa9880c42565bb7ed5b9872eb80db921940ec5d48ef72b8060a6a32f3f064"


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def with_value(row, column, text):
    """The 400-row table with one value (row counted from 1, column as published) replaced."""
    lines = table_lines(400)
    values = lines[row].split(",")
    values[TABLE_HEADER.split(",").index(column)] = text
    lines[row] = ",".join(values)
    return lines


@pytest.fixture(autouse=True)
def empty_data_folder(tmp_path, monkeypatch):
    """Keeps a developer's own data/ and AADL_DATA_DIR out of the tests."""
    monkeypatch.setattr(graduate_admissions, "DATA_FOLDER", tmp_path / "data")
    monkeypatch.delenv("AADL_DATA_DIR", raising=False)


@pytest.mark.parametrize("rows", [400, 500])
def test_both_editions_are_read(tmp_path, rows):
    path = write(tmp_path / "table.csv", table_lines(rows))
    data, expected = load(path), surrogate(rows)
    np.testing.assert_array_equal(data.features, expected.features)
    np.testing.assert_array_equal(data.target, expected.target)
    assert data.features.shape == (rows, 7) and data.features.dtype == data.target.dtype == np.float64
    assert (data.source, data.path) == ("csv", str(path))


def test_header_spaces_column_order_and_byte_order_mark_do_not_matter(tmp_path):
    lines = [",".join(reversed(line.split(","))) for line in table_lines(400)]
    lines[0] = "\ufeff" + ",".join(f"  {name.strip()} " for name in lines[0].split(","))
    data = load(write(tmp_path / "table.csv", lines))
    np.testing.assert_array_equal(data.features, surrogate(400).features)


@pytest.mark.parametrize("name", ["graduate_admissions.csv", "Admission_Predict.csv", "Admission_Predict_Ver1.1.csv"])
def test_a_folder_is_searched_for_the_known_names(tmp_path, name):
    path = write(tmp_path / name, table_lines(400))
    assert load(tmp_path).path == load(env={"AADL_DATA_DIR": str(tmp_path)}).path == str(path)


def test_precedence_is_path_then_environment_then_data_folder_then_surrogate(tmp_path, monkeypatch):
    data, variable, explicit = (
        tmp_path / name / "graduate_admissions.csv" for name in ("data", "variable", "explicit")
    )
    env = {"AADL_DATA_DIR": str(variable.parent)}

    assert (load(env={}).source, load(env={}).path) == ("surrogate", None)
    write(data, table_lines(400))
    assert load(env={}).path == str(data)
    assert load(env={"AADL_DATA_DIR": ""}).path == str(data)
    write(variable, table_lines(400))
    assert load(env=env).path == str(variable)
    write(explicit, table_lines(400))
    assert load(explicit, env).path == load(explicit.parent, env).path == str(explicit)
    monkeypatch.setenv("AADL_DATA_DIR", env["AADL_DATA_DIR"])
    assert load().path == str(variable)


def test_a_named_place_without_the_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv does not exist$"):
        load(tmp_path / "nowhere.csv")
    with pytest.raises(FileNotFoundError, match=r"holds none of graduate_admissions\.csv, .*; name the file itself$"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds none of .*; correct AADL_DATA_DIR, or unset it$"):
        load(env={"AADL_DATA_DIR": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder; correct AADL_DATA_DIR"):
        load(env={"AADL_DATA_DIR": str(tmp_path / "nowhere")})


@pytest.mark.parametrize(
    ("row", "column", "text", "message"),
    [
        (1, "GRE Score", "", "row 1, column 'GRE Score': the value is missing"),
        (400, "Chance of Admit ", " ", "row 400, column 'Chance of Admit': the value is missing"),
        (7, "LOR ", "four", "row 7, column 'LOR': 'four' is not a number"),
        (7, "LOR ", "5.5", r"row 7, column 'LOR': 5\.5 is outside \[1, 5\]"),
        (7, "SOP", "3.3", r"row 7, column 'SOP': 3\.3 is not a multiple of 0\.5"),
        (30, "CGPA", "nan", r"row 30, column 'CGPA': nan is outside \[0, 10\]"),
        (30, "CGPA", "86.5", r"row 30, column 'CGPA': 86\.5 is outside \[0, 10\]"),
        (30, "Research", "0.5", r"row 30, column 'Research': 0\.5 is not a multiple of 1"),
        (30, "Chance of Admit ", "-0.1", r"row 30, column 'Chance of Admit': -0\.1 is outside \[0, 1\]"),
        (30, "TOEFL Score", "inf", r"row 30, column 'TOEFL Score': inf is outside \[0, 120\]"),
        (30, "TOEFL Score", "110,110", "row 30 has 10 values where the header has 9 columns"),
    ],
)
def test_a_bad_value_is_named_with_row_and_column(tmp_path, row, column, text, message):
    path = write(tmp_path / "table.csv", with_value(row, column, text))
    with pytest.raises(ValueError, match=rf"table\.csv: {message}$"):
        load(path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "column 'GRE Score' is missing in the header ''"),
        (["<!DOCTYPE html>"], "column 'GRE Score' is missing in the header '<!DOCTYPE html>'"),
        ([line.replace("CGPA", "GPA") for line in table_lines(400)], "column 'CGPA' is missing"),
        ([line.replace("SOP", "LOR") for line in table_lines(400)], "column 'SOP' is missing"),
        ([f"{line},{line}" for line in table_lines(400)], "column 'GRE Score' is twice in the header"),
        (table_lines(400)[:-1], "has 399 rows where the published editions have 400 or 500"),
        ([TABLE_HEADER], "has 0 rows"),
    ],
    ids=["empty", "html", "renamed", "replaced", "doubled", "truncated", "header only"],
)
def test_another_table_is_refused(tmp_path, lines, message):
    with pytest.raises(ValueError, match=rf"table\.csv: {message}"):
        load(write(tmp_path / "table.csv", lines))


def test_a_binary_file_is_refused(tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(ValueError, match=r"table\.csv: not a CSV text file in UTF-8"):
        load(path)


def assert_statistics(data, mean, std, correlation):
    """Ranges and steps as published; mean and std within relative, correlations within absolute bounds."""
    table = np.column_stack([data.features, data.target])
    for values, column in zip(table.T, COLUMNS, strict=True):
        assert (values.min(), values.max()) == (column.minimum, column.maximum), column.name
        steps = (values - column.minimum) / column.step
        np.testing.assert_allclose(steps, steps.round(), atol=1e-6, err_msg=column.name)
        assert values.mean() == pytest.approx(column.mean, rel=mean), column.name
        assert values.std() == pytest.approx(column.std, rel=std), column.name
    np.testing.assert_allclose(np.corrcoef(table.T), CORRELATIONS, atol=correlation)


@pytest.mark.parametrize("seed", range(5))
def test_the_surrogate_has_the_published_statistics(seed):
    assert_statistics(surrogate(seed=seed), mean=0.01, std=0.01, correlation=0.02)


def test_the_surrogate_has_about_as_many_distinct_values_as_the_file():
    data = surrogate()
    counts = [len(np.unique(values)) for values in np.column_stack([data.features, data.target]).T]
    np.testing.assert_allclose(counts, [49, 29, 5, 9, 9, 168, 2, 60], rtol=0.2)


def test_the_surrogate_is_determined_by_its_seed():
    first, again, other = surrogate(), surrogate(), surrogate(seed=1)
    np.testing.assert_array_equal(first.features, again.features)
    np.testing.assert_array_equal(first.target, again.target)
    assert not np.array_equal(first.target, other.target)
    assert first.source == "surrogate" and first.features.shape == (400, 7)


def test_split_is_a_seeded_partition():
    data = surrogate()
    train, test = split(data)
    assert (len(train), len(test)) == (320, 80)
    assert sorted([*train, *test]) == list(range(400))
    # Written down once: the frozen stream of RandomState(42), the same on every machine.
    assert test[:5].tolist() == [209, 280, 33, 210, 93]
    np.testing.assert_array_equal(split(data)[1], test)
    assert not np.array_equal(split(data, seed=43)[1], test)
    assert len(split(data, test_fraction=0.001)[1]) == 1


def test_split_leaves_rows_for_training():
    with pytest.raises(ValueError, match="leaves none for training"):
        split(surrogate(), test_fraction=0.999)


REAL_FOLDERS = [os.environ.get("AADL_DATA_DIR") or None, "../shared/data"]
REAL_FILE = next((Path(f, "graduate_admissions.csv") for f in REAL_FOLDERS if f and Path(f).is_dir()), Path("none"))


@pytest.mark.skipif(not REAL_FILE.is_file(), reason="the real graduate_admissions.csv is not in AADL_DATA_DIR")
def test_the_real_file_is_the_400_row_edition_and_has_the_table_s_statistics():
    assert hashlib.sha256(REAL_FILE.read_bytes()).hexdigest() == SHA256
    data = load(REAL_FILE)
    assert data.source == "csv" and data.features.shape == (400, 7)
    assert data.features[0].tolist() == [337, 118, 4, 4.5, 4.5, 9.65, 1] and data.target[0] == 0.92
    assert_statistics(data, mean=1e-4, std=5e-4, correlation=6e-4)
