from launch.tables import format_table


def test_table_is_aligned_and_fills_gaps():
    table = format_table([{"guidance": 0.0, "FID": 12.345678}, {"guidance": 1.5, "recall": 0.5}])
    assert table.splitlines() == [
        "| guidance | FID    | recall |",
        "|----------|--------|--------|",
        "| 0        | 12.346 |        |",
        "| 1.5      |        | 0.5    |",
    ]
