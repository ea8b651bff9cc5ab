"""The graduate-admissions table: seven scores of an applicant, and the chance of admission to predict.

M. S. Acharya, A. Armaan, A. S. Antony, "A Comparison of Regression Models for Prediction of Graduate Admissions", 2019;
published on Kaggle under CC0 in editions of 400 and 500 rows. Where no file is found, `load` returns a surrogate with
the statistics of the 400-row edition, marked as such in `source`.
"""

import csv
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

FILE_NAMES = ("graduate_admissions.csv", "Admission_Predict.csv", "Admission_Predict_Ver1.1.csv")
EDITIONS = (400, 500)  # rows
DATA_FOLDER = Path(__file__).resolve().parent.parent / "data"


class Column(NamedTuple):
    """What a value may be (`lowest`, `highest`: the scale of the score), and its statistics in the 400-row edition."""

    name: str
    lowest: float
    highest: float
    step: float  # between neighboring values
    minimum: float
    maximum: float
    mean: float
    std: float  # divided by the number of rows


# Statistics of the 400-row edition (the file whose header ends in "Chance of Admit "), measured on it; target last.
COLUMNS = (
    Column("GRE Score", 260, 340, 1, 290, 340, 316.81, 11.46),
    Column("TOEFL Score", 0, 120, 1, 92, 120, 107.41, 6.06),
    Column("University Rating", 1, 5, 1, 1, 5, 3.0875, 1.1423),
    Column("SOP", 1, 5, 0.5, 1, 5, 3.40, 1.0056),
    Column("LOR", 1, 5, 0.5, 1, 5, 3.4525, 0.8974),
    Column("CGPA", 0, 10, 0.01, 6.80, 9.92, 8.5989, 0.5956),
    Column("Research", 0, 1, 1, 0, 1, 0.5475, 0.4977),
    Column("Chance of Admit", 0, 1, 0.01, 0.34, 0.97, 0.7244, 0.1424),
)
CORRELATIONS = (
    (1.000, 0.836, 0.669, 0.613, 0.558, 0.833, 0.580, 0.803),
    (0.836, 1.000, 0.696, 0.658, 0.568, 0.828, 0.490, 0.792),
    (0.669, 0.696, 1.000, 0.735, 0.660, 0.746, 0.448, 0.711),
    (0.613, 0.658, 0.735, 1.000, 0.730, 0.718, 0.444, 0.676),
    (0.558, 0.568, 0.660, 0.730, 1.000, 0.670, 0.397, 0.670),
    (0.833, 0.828, 0.746, 0.718, 0.670, 1.000, 0.522, 0.873),
    (0.580, 0.490, 0.448, 0.444, 0.397, 0.522, 1.000, 0.553),
    (0.803, 0.792, 0.711, 0.676, 0.670, 0.873, 0.553, 1.000),
)


@dataclass(frozen=True, eq=False)
class GraduateAdmissions:
    """The table in the file's units: features (rows, 7), target (rows,), float64; `path` is None for the surrogate."""

    features: NDArray[np.float64]
    target: NDArray[np.float64]
    source: Literal["csv", "surrogate"]
    path: str | None


def load(path: str | os.PathLike[str] | None = None, env: Mapping[str, str] | None = None) -> GraduateAdmissions:
    """Reads the table from `path`, else from the folder AADL_DATA_DIR, else from data/, else makes the surrogate.

    Args:
        path: the CSV file, or a folder that holds it under one of FILE_NAMES (the first found, in that order).
        env: where AADL_DATA_DIR is looked up, os.environ by default; an empty value counts as unset.

    Raises:
        FileNotFoundError: `path` or AADL_DATA_DIR was given and leads to no file.
        ValueError: the file is not the table; the message names the row, the column and the value.
    """
    if path is not None:
        named = Path(path)
        if not named.exists():
            raise FileNotFoundError(f"graduate admissions: {named} does not exist")
        if not named.is_dir():
            return _read(named)
        return _read(_find(named) or _not_in(named, "name the file itself"))
    folder = (os.environ if env is None else env).get("AADL_DATA_DIR")
    if folder:
        return _read(_find(Path(folder)) or _not_in(Path(folder), "correct AADL_DATA_DIR, or unset it"))
    found = _find(DATA_FOLDER)
    return surrogate() if found is None else _read(found)


def split(
    data: GraduateAdmissions, test_fraction: float = 0.2, seed: int = 42
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row numbers for training and for testing: a random permutation whose first part is the test set.

    The permutation is that of numpy's RandomState, whose stream is frozen: the same rows on every machine and version.
    The number of test rows, a share in (0, 1), is rounded up; ValueError where no row is left for training.
    """
    rows = len(data.target)
    num_test = int(np.ceil(test_fraction * rows))
    if num_test >= rows:
        raise ValueError(f"test_fraction {test_fraction} of {rows} rows leaves none for training")
    order = np.random.RandomState(seed).permutation(rows).astype(np.int64)
    return order[num_test:], order[:num_test]


def surrogate(rows: int = 400, seed: int = 0) -> GraduateAdmissions:
    """Random rows, at least 100, with the ranges, steps, means, deviations and correlations of the 400-row edition.

    Correlated normal columns z are scaled, clipped to the range and rounded to the step of their column. Clipping and
    rounding change the moments, so center, scale and the correlations of z are corrected until those of the result fit.
    """
    lowest, highest, step, mean, std = np.array([(c.minimum, c.maximum, c.step, c.mean, c.std) for c in COLUMNS]).T
    target = np.array(CORRELATIONS)
    white = np.random.RandomState(seed).standard_normal((rows, len(COLUMNS)))
    white -= white.mean(axis=0)
    white = np.linalg.svd(white, full_matrices=False)[0] * np.sqrt(rows)  # zero means, unit covariance, exactly

    center, scale, latent = mean.copy(), std.copy(), target.copy()
    for _ in range(100):
        eigenvalues, eigenvectors = np.linalg.eigh(latent)
        z = white @ (eigenvectors * np.sqrt(eigenvalues.clip(min=0))) @ eigenvectors.T
        steps = np.rint((np.clip(center + scale * z, lowest, highest) - lowest) / step)
        table = lowest + step * steps
        columns = np.arange(len(COLUMNS))
        table[z.argmin(axis=0), columns], table[z.argmax(axis=0), columns] = lowest, highest
        center += 0.5 * (mean - table.mean(axis=0))
        scale *= np.sqrt(std / table.std(axis=0))
        latent += 0.5 * (target - np.corrcoef(table.T))
        np.fill_diagonal(latent, 1.0)
    table = table.round(2)
    return GraduateAdmissions(table[:, :-1].copy(), table[:, -1].copy(), source="surrogate", path=None)


def _find(folder: Path) -> Path | None:
    return next((folder / name for name in FILE_NAMES if (folder / name).is_file()), None)


def _not_in(folder: Path, remedy: str) -> NoReturn:
    problem = f"holds none of {', '.join(FILE_NAMES)}" if folder.is_dir() else "is not a folder"
    raise FileNotFoundError(f"graduate admissions: {folder} {problem}; {remedy}")


def _read(path: Path) -> GraduateAdmissions:
    """Reads and checks the CSV file; rows are counted from 1 below the header."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file) if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV text file in UTF-8 ({error})") from None
    header = [name.strip() for name in lines[0]] if lines else []
    for column in COLUMNS:
        if header.count(column.name) != 1:
            problem = "twice" if column.name in header else "missing"
            raise ValueError(f"{path}: column {column.name!r} is {problem} in the header {', '.join(header)[:200]!r}")
    positions = [header.index(column.name) for column in COLUMNS]
    table = np.empty((len(lines) - 1, len(COLUMNS)))
    for row, line in enumerate(lines[1:], start=1):
        if len(line) != len(header):
            raise ValueError(f"{path}: row {row} has {len(line)} values where the header has {len(header)} columns")
        for j, (column, position) in enumerate(zip(COLUMNS, positions, strict=True)):
            try:
                table[row - 1, j] = _value(line[position].strip(), column)
            except ValueError as error:
                raise ValueError(f"{path}: row {row}, column {column.name!r}: {error}") from None
    if len(table) not in EDITIONS:
        expected = " or ".join(map(str, EDITIONS))
        raise ValueError(f"{path}: has {len(table)} rows where the published editions have {expected}")
    return GraduateAdmissions(table[:, :-1].copy(), table[:, -1].copy(), source="csv", path=str(path))


def _value(text: str, column: Column) -> float:
    if not text:
        raise ValueError("the value is missing")
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None
    if not column.lowest <= value <= column.highest:  # refuses NaN
        raise ValueError(f"{text} is outside [{column.lowest}, {column.highest}]")
    if column.step >= 0.5 and value % column.step:
        raise ValueError(f"{text} is not a multiple of {column.step}")
    return value
