"""Rebuild the embedded set: `python -m priorguide.data.fashion --idx FOLDER --out FOLDER`."""

import argparse

from . import build


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m priorguide.data.fashion", description="Rebuild the embedded set.")
    parser.add_argument(
        "--idx", required=True, metavar="FOLDER", help="holds the four original IDX files, or their .gz"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the parquet files and splits.json go")
    arguments = parser.parse_args()
    try:
        sizes = build(arguments.idx, arguments.out)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print(", ".join(f"{split}.parquet {size:,} bytes" for split, size in sizes.items()))


if __name__ == "__main__":
    main()
