"""Orders the items of a benchmark at random; a search can make items that tell models apart come early.

Each item comes at a random time with its *chance* as the rate, so the next item is drawn from the remaining ones with a
probability proportional to its chance (Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir", Information
Processing Letters 97:181). The time depends on the item's hash, its chance and the seed alone: without chances the order is the
same for every model.

    python evaluate.py ... benchmark.order=outputs/nano-nano-cpu/trials/17/order.parquet
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from winnow.core.errors import UserError
from winnow.core.files import atomic_write

FILE = "order.parquet"
Item = tuple[str, str]  # name of the benchmark, and hash of the item


@dataclass(frozen=True)
class Order:
    """A random order of items.

    Attributes:
        seed: the seed of the random times.
        chances: relative chances above 0, by item; an item that is not listed has 1.
    """

    seed: int
    chances: Mapping[Item, float] = field(default_factory=dict)

    def chance(self, item: Item) -> float:
        return self.chances.get(item, 1.0)

    def time(self, item: Item) -> float:
        """Returns the random time of an item, the sort key of the order."""
        benchmark, doc_hash = item
        random_bytes = hashlib.sha256(f"{self.seed} {benchmark} {doc_hash}".encode()).digest()[:8]
        uniform = (int.from_bytes(random_bytes) + 0.5) / 2**64
        return -math.log(uniform) / self.chance(item)

    def write(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {
            "benchmark": [benchmark for benchmark, _ in self.chances],
            "doc_hash": [doc_hash for _, doc_hash in self.chances],
            "chance": list(self.chances.values()),
        }
        table = pa.table(columns).replace_schema_metadata({"seed": str(self.seed)})
        with atomic_write(path) as scratch:
            pq.write_table(table, scratch, compression="zstd")


@functools.lru_cache(maxsize=4)
def read_order(path: str) -> Order:
    """Loads an order that `Order.write` wrote.

    Raises:
        UserError: the file does not exist, or it holds no order.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, partitioning=None)
        rows = table.to_pydict()
        items = zip(rows["benchmark"], rows["doc_hash"], strict=True)
        chances = dict(zip(items, rows["chance"], strict=True))
        return Order(int(table.schema.metadata[b"seed"]), chances)
    except FileNotFoundError:
        raise UserError(f"benchmark.order={path}: there is no such file; a search writes it for each trial") from None
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(f"benchmark.order={path} is not an order that a search wrote: {error}") from None
