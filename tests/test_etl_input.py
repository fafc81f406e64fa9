"""Bad input: refused with file, column, row or value and what to do, or handled as documented."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import polars as pl
import pytest

from t4r_fast.errors import InputError
from t4r_fast.etl import Workflow, parse_map, run

HEADER = (
    "event_time,event_type,product_id,category_id,category_code,brand,price,user_id,user_session"
)
GOOD = [
    "2019-10-01 00:00:00 UTC,view,1,10,,acme,1.5,7,a",
    "2019-10-01 00:00:05 UTC,view,2,10,,acme,2.5,7,a",
    "2019-10-01 00:00:09 UTC,cart,3,20,,,3.5,8,b",
    "2019-10-01 00:01:00 UTC,view,1,10,,acme,1.5,8,b",
]


def write(path: Path, *rows: str, header: str = HEADER) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def refused(path, out, *parts, **options):
    """The run is refused, the message holds all the parts, and nothing is left behind."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(InputError) as caught:
        run(path, out, **options)
    for part in parts:
        assert str(part) in str(caught.value), str(caught.value)
    assert sorted(out.parent.iterdir()) == before


def ids_of(out: Path, split="train") -> list[list[int]]:
    """Item values of the sessions in order of time, whatever their split."""
    workflow = Workflow.load(out / "workflow")
    sessions = pl.concat([pl.read_parquet(p) for p in out.glob("sessions_by_day/*/*.parquet")])
    lists = sessions.sort("session_start")["product_id-list_seq"].to_list()
    return [workflow.items(ids) for ids in lists]


# -- files -----------------------------------------------------------------------------------------


def test_no_such_file(tmp_path):
    refused(tmp_path / "none.csv", tmp_path / "out", tmp_path / "none.csv", "no such file")


def test_empty_file(tmp_path):
    (tmp_path / "e.csv").touch()
    refused(tmp_path / "e.csv", tmp_path / "out", tmp_path / "e.csv", "is empty")
    (tmp_path / "e.parquet").touch()
    refused(tmp_path / "e.parquet", tmp_path / "out", tmp_path / "e.parquet", "is empty")


def test_one_empty_file_among_good_ones(tmp_path):
    write(tmp_path / "a.csv", *GOOD)
    (tmp_path / "b.csv").touch()
    refused(tmp_path, tmp_path.parent / "out-b", tmp_path / "b.csv", "is empty")


def test_header_without_events(tmp_path):
    path = write(tmp_path / "e.csv")
    refused(path, tmp_path / "out", path, "no events")
    pl.DataFrame(schema=dict.fromkeys(HEADER.split(","), pl.Int64)).write_parquet(
        tmp_path / "e.parquet"
    )
    refused(tmp_path / "e.parquet", tmp_path / "out", tmp_path / "e.parquet", "no events")


def test_blank_first_line(tmp_path):
    (tmp_path / "e.csv").write_text("\n\n")
    refused(tmp_path / "e.csv", tmp_path / "out", "first line must name the columns")


def test_folder_without_event_files(tmp_path):
    (tmp_path / "readme.md").write_text("x")
    refused(tmp_path, tmp_path.parent / "out-c", tmp_path, "readme.md", ".parquet")


def test_the_same_file_twice(tmp_path):
    path = write(tmp_path / "e.csv", *GOOD)
    refused([path, tmp_path], tmp_path / "out", path, "twice")


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.999])
def test_truncated_parquet(tmp_path, keep):
    pl.read_csv(write(tmp_path / "e.csv", *GOOD)).write_parquet(tmp_path / "whole.parquet")
    data = (tmp_path / "whole.parquet").read_bytes()
    path = tmp_path / "cut.parquet"
    path.write_bytes(data[: int(len(data) * keep)])
    refused(path, tmp_path / "out", path, "truncated", "copy it again")


def test_parquet_with_damaged_pages(tmp_path):
    events = pl.read_csv(write(tmp_path / "e.csv", *GOOD * 300))
    path = tmp_path / "bad.parquet"
    events.write_parquet(path)
    data = bytearray(path.read_bytes())
    data[40:200] = bytes(160)
    path.write_bytes(data)
    refused(path, tmp_path / "out", path, "damaged")


def test_truncated_gzip(tmp_path):
    rows = [
        f"2019-10-01 00:00:00 UTC,view,{i},1,,b,1.0,1,s{i * 7919 % 1000}" for i in range(60_000)
    ]
    data = gzip.compress("\n".join([HEADER, *rows]).encode())
    path = tmp_path / "e.csv.gz"
    path.write_bytes(data[: len(data) // 2])
    refused(path, tmp_path / "out", path)


def test_a_text_file_that_is_called_parquet(tmp_path):
    path = write(tmp_path / "e.parquet", *GOOD)
    refused(path, tmp_path / "out", path, "no whole parquet file")


def test_row_with_too_many_fields(tmp_path):
    path = write(tmp_path / "e.csv", *GOOD, GOOD[0] + ",more,fields")
    refused(path, tmp_path / "out", path, "row 5", "11 fields", "9")


def test_bytes_that_are_no_utf8(tmp_path):
    path = tmp_path / "e.csv"
    path.write_bytes("\n".join([HEADER, *GOOD]).replace("acme", "Zürich").encode("latin-1"))
    refused(path, tmp_path / "out", path, "UTF-8")


def test_doubled_column(tmp_path):
    path = write(tmp_path / "e.csv", "1,2,3", header="user_session,brand,brand")
    refused(path, tmp_path / "out", path, "'brand'", "twice")


# -- columns ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "column"),
    [("session", "user_session"), ("item", "product_id"), ("time", "event_time")],
)
def test_missing_column(tmp_path, role, column):
    path = write(tmp_path / "e.csv", *GOOD, header=HEADER.replace(column, "other"))
    refused(path, tmp_path / "out", path, repr(column), f"--map {role}=COLUMN", "other")


def test_mapped_side_column_that_is_not_there(tmp_path):
    path = write(tmp_path / "e.csv", *GOOD)
    refused(path, tmp_path / "out", "'maker'", "--map brand=", map={"brand": "maker"})


def test_column_in_one_file_only(tmp_path):
    write(tmp_path / "1.csv", *GOOD)
    write(tmp_path / "2.csv", *GOOD, header=HEADER.replace("brand", "maker"))
    refused(tmp_path, tmp_path.parent / "out-d", tmp_path / "2.csv", "'brand'")


def test_event_types_without_the_column(tmp_path):
    path = write(tmp_path / "e.csv", *GOOD, header=HEADER.replace("event_type", "kind"))
    refused(path, tmp_path / "out", "'event_type'", event_types=["view"])


def test_no_event_of_the_type(tmp_path):
    path = write(tmp_path / "e.csv", *GOOD)
    refused(path, tmp_path / "out", path, "none of the 4 events", "buy", event_types=["buy"])


def test_one_column_for_two_roles(tmp_path):
    path = write(tmp_path / "e.csv", *GOOD)
    refused(path, tmp_path / "out", "'brand'", "two roles", map={"item": "brand"})


@pytest.mark.parametrize(
    ("column", "values", "rule"),
    [
        ("product_id", [[1], [2], [3], [4]], "whole numbers or text"),
        ("user_session", [True, False, True, True], "whole numbers or text"),
        ("event_time", [True, False, True, True], "text, numbers or times"),
        ("price", ["1", "2", "3", "4"], "numbers"),
    ],
)
def test_column_of_a_wrong_type(tmp_path, column, values, rule):
    events = pl.read_csv(write(tmp_path / "e.csv", *GOOD)).with_columns(pl.Series(column, values))
    path = tmp_path / "e.parquet"
    events.write_parquet(path)
    refused(path, tmp_path / "out", path, repr(column), rule)


@pytest.mark.parametrize("text", ["item", "item=a,item=b", "colour=c", "item="])
def test_map_that_is_none(text):
    with pytest.raises(InputError, match=r"^map: "):
        parse_map(text)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"window": "soon"}, "30m"),
        ({"keep": "middle"}, "'last' or 'first'"),
        ({"suffix": "_x"}, "-list_seq"),
        ({"min_length": 0}, "at least 1"),
        ({"max_length": 1}, "at least min_length"),
        ({"seed": -1}, "seed"),
        ({"text": ["price"]}, "text: the role"),
        ({"window": "1s", "map": {"time": "when"}}, "choose a longer one"),
    ],
)
def test_options_out_of_range(tmp_path, options, part):
    rows = ["0,1,a", "1,2,a", "9000000,1,b", "9000001,2,b"]
    rows = [f"{1_569_888_000 + int(r.split(',')[0])},{r.split(',', 1)[1]}" for r in rows]
    path = write(tmp_path / "e.csv", *rows, header="when,product_id,user_session")
    refused(path, tmp_path / "out", part, **{"map": {"time": "when"}, **options})


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["yesterday", "2019-13-01 00:00:00 UTC", "20191001", "12", "-1"])
def test_value_that_is_no_time(tmp_path, when):
    path = write(tmp_path / "e.csv", *GOOD, f"{when},view,1,1,,x,1.0,1,c")
    refused(path, tmp_path / "out", path, "'event_time'", "row 5", repr(when), "epoch seconds")


def test_missing_time(tmp_path):
    path = write(tmp_path / "e.csv", *GOOD, ",view,1,1,,x,1.0,1,c")
    refused(path, tmp_path / "out", path, "'event_time'", "row 5", "is missing")


def test_row_number_counts_within_the_file_and_over_left_out_events(tmp_path):
    write(tmp_path / "1.csv", *GOOD)
    lost = GOOD[0].removesuffix("a")
    path = write(tmp_path / "2.csv", GOOD[0], lost, lost, "never,view,1,1,,x,1.0,1,c")
    refused(tmp_path, tmp_path.parent / "out-e", path, "row 4", "'never'")


@pytest.mark.parametrize(
    ("price", "rule"),
    [
        ('"1,50"', "is no number"),
        ("-1", "not below 0"),
        ("inf", "finite"),
        ("free", "is no number"),
    ],
)
def test_price_out_of_range(tmp_path, price, rule):
    path = write(tmp_path / "e.csv", *GOOD, f"2019-10-01 00:00:00 UTC,view,1,1,,x,{price},1,c")
    refused(path, tmp_path / "out", path, "'price'", "row 5", price.strip('"'), rule)


def test_text_after_whole_numbers(tmp_path):
    rows = [f"2019-10-01 00:00:00 UTC,view,{i},1,,x,1.0,1,s{i // 4}" for i in range(10_001)]
    path = write(tmp_path / "e.csv", *rows, "2019-10-01 00:00:00 UTC,view,A-17,1,,x,1.0,1,s1")
    refused(path, tmp_path / "out", path, "'product_id'", "row 10002", "'A-17'", "--text item")
    run(path, tmp_path / "out", text=["item"])
    workflow = Workflow.load(tmp_path / "out" / "workflow")
    assert workflow.item_ids(["A-17", "5"]).min() >= 3


def test_ids_with_leading_zeros_stay_text(tmp_path):
    rows = [
        f"2019-10-01 00:00:0{i} UTC,view,{item},1,,x,1.0,1,a" for i, item in enumerate(["07", "7"])
    ]
    run(write(tmp_path / "e.csv", *rows), tmp_path / "out")
    assert ids_of(tmp_path / "out") == [["07", "7"]]


def test_fractions_as_ids(tmp_path):
    events = pl.read_csv(write(tmp_path / "e.csv", *GOOD))
    # pandas makes whole ids floats when one is missing
    whole = events.with_columns(pl.Series("product_id", [1.0, 2.0, 3.0, float("nan")]))
    whole.write_parquet(tmp_path / "whole.parquet")
    run(tmp_path / "whole.parquet", tmp_path / "out")
    assert ids_of(tmp_path / "out") == [[1, 2], [3, None]]
    path = tmp_path / "half.parquet"
    events.with_columns(pl.Series("product_id", [1.0, 2.5, 3.0, 4.0])).write_parquet(path)
    refused(path, tmp_path / "out2", path, "'product_id'", "row 2", "2.5", "integers")


# -- what is handled -------------------------------------------------------------------------------


def test_missing_ids(tmp_path):
    rows = [
        *GOOD,
        "2019-10-01 00:02:00 UTC,view,,20,,acme,1.0,8,b",
        "2019-10-01 00:03:00 UTC,view,2,,,,1.0,8,b",
        "2019-10-01 00:03:00 UTC,view,2,10,,acme,1.0,8,",
    ]
    summary = run(write(tmp_path / "e.csv", *rows), tmp_path / "out")
    assert (summary.events_without_session, summary.events_without_item) == (1, 1)
    assert ids_of(tmp_path / "out") == [[1, 2], [3, 1, None, 2]]
    sessions = pl.concat(
        [pl.read_parquet(p) for p in (tmp_path / "out").glob("sessions_by_day/*/*.parquet")]
    ).sort("session_start")
    # 1 stands for missing; no event here has an unknown value, 2
    assert sessions["product_id-list_seq"][1].to_list()[2] == 1
    assert sessions["category_id-list_seq"][1].to_list()[3] == 1
    assert sessions["brand-list_seq"][1].to_list() == [1, 3, 3, 1]


def test_times_out_of_order_and_ties_keep_the_order_of_the_file(tmp_path):
    summary = run(write(tmp_path / "e.csv", *GOOD[::-1]), tmp_path / "out")
    assert ids_of(tmp_path / "out") == [[1, 2], [3, 1]]
    assert summary.events_kept == 4
    tied = [re.sub(r"00:0\d:0\d", "00:00:00", row) for row in GOOD]
    run(write(tmp_path / "t.csv", *tied[::-1]), tmp_path / "tied")
    assert sorted(ids_of(tmp_path / "tied")) == [[1, 3], [2, 1]]


def test_duplicates_of_events_are_repeats(tmp_path):
    write(tmp_path / "1.csv", *GOOD)
    write(tmp_path / "2.csv", *GOOD)
    summary = run([tmp_path / "1.csv", tmp_path / "2.csv"], tmp_path / "out")
    assert (summary.events_read, summary.events_repeated) == (8, 4)
    assert ids_of(tmp_path / "out") == [[1, 2], [3, 1]]


def test_sessions_all_of_length_one(tmp_path):
    rows = [f"2019-10-01 00:00:00 UTC,view,{i},1,,x,1.0,1,s{i}" for i in range(5)]
    path = write(tmp_path / "e.csv", *rows)
    refused(path, tmp_path / "out", path, "2 events", "5 are shorter", "'user_session'")
    assert run(path, tmp_path / "out", min_length=1).sessions == 5


def test_no_session_at_all(tmp_path):
    rows = [row.rsplit(",", 1)[0] + "," for row in GOOD]
    path = write(tmp_path / "e.csv", *rows)
    refused(path, tmp_path / "out", path, "'user_session'", "--map session=COLUMN")


def test_emoji_brands_and_quoted_fields(tmp_path):
    brands = ["🦄 shop", '"a, b"', '"line\nbreak"', "Ωmega"]
    rows = [f"2019-10-01 00:00:0{i} UTC,view,{i},1,,{b},1.0,1,a" for i, b in enumerate(brands)]
    run(write(tmp_path / "e.csv", *rows), tmp_path / "out")
    workflow = Workflow.load(tmp_path / "out" / "workflow")
    assert sorted(workflow.vocabularies["brand"]["value"]) == sorted(
        ["🦄 shop", "a, b", "line\nbreak", "Ωmega"]
    )


def test_windows_line_ends_and_byte_order_mark(tmp_path):
    text = "\ufeff" + "\r\n".join([HEADER, *GOOD]) + "\r\n"
    (tmp_path / "e.csv").write_bytes(text.encode("utf-8"))
    run(tmp_path / "e.csv", tmp_path / "out")
    header = HEADER.split(",")
    # the first column carries the mark, the last one the line end
    assert (header[0], header[-1]) == ("event_time", "user_session")
    assert ids_of(tmp_path / "out") == [[1, 2], [3, 1]]


def test_missing_prices_count_as_the_mean(tmp_path):
    rows = [row.replace(",2.5,", ",,") for row in GOOD]
    run(write(tmp_path / "e.csv", *rows), tmp_path / "out")
    sessions = pl.concat(
        [pl.read_parquet(p) for p in (tmp_path / "out").glob("sessions_by_day/*/*.parquet")]
    ).sort("session_start")
    assert sessions["price_log_norm-list_seq"][0][1] == 0.0
    assert sessions["relative_price_to_avg_categ_id-list_seq"][0][1] == 0.0
    assert sessions["price_log_norm-list_seq"][0][0] != 0.0
