"""Which sizes of clusters a bench of the LoRA op compares, and where the size matters."""

import argparse

from slora.kernels.lora import CLUSTERS

FEW_ROWS = [(1, 1), (4, 4), (8, 8), (16, 16), (32, 32), (64, 1), (64, 64)]
"""Rows and adapters with few units, or about as many as the device has room for."""
FEW_RANKS = (8, 16, 64)
SIZES = {"auto": None} | {str(size): size for size in CLUSTERS}
"""Blocks of a cluster; None: as the op chooses."""


def add_clusters(parser: argparse.ArgumentParser) -> None:
    """`--cluster`, names of SIZES to be measured one after the other, and `--few`."""
    parser.add_argument(
        "--cluster",
        dest="clusters",
        nargs="+",
        choices=SIZES,
        default=["auto"],
        help="blocks of a cluster; auto: as the op chooses. Several are measured one after the other",
    )
    parser.add_argument("--few", action="store_true", help="only up to 64 rows, where the size of clusters matters")
