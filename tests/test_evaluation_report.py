import json

import pytest

from tarflow_jax.evaluation.report import format_protocol, format_table, write_json


def test_table_is_aligned_and_fills_gaps():
    table = format_table([{"guidance": 0.0, "FID": 12.345678}, {"guidance": 1.5, "recall": 0.5}])
    assert table.splitlines() == [
        "| guidance | FID    | recall |",
        "|----------|--------|--------|",
        "| 0        | 12.346 |        |",
        "| 1.5      |        | 0.5    |",
    ]


def test_protocol_is_one_line_a_field():
    assert format_protocol({"seed": 0, "guidance": {"weight": 1.5, "target": "both"}}) == (
        "seed: 0\nguidance.weight: 1.5\nguidance.target: both"
    )


def test_json_is_whole_or_absent(tmp_path):
    write_json(tmp_path / "deep" / "result.json", {"Fréchet": 1.0})
    assert json.loads((tmp_path / "deep" / "result.json").read_text(encoding="utf-8")) == {"Fréchet": 1.0}
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "bad.json", {"x": float("nan")})
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
