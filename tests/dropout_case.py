"""What the tests of ops that drop share: places, and the draws once more, one word at a time."""

import torch

SEED = torch.tensor([0x1234567887654321, -0x0123456789ABCDEF])
WORD = 0xFFFFFFFF


def philox(key, counter):
    """Philox4x32-10 as in Salmon et al., SC 2011, of Python's whole numbers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & WORD, key >> 32
    for _ in range(10):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (second >> 32) ^ c1 ^ k0,
            second & WORD,
            (first >> 32) ^ c3 ^ k1,
            first & WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def site_key(seed, site):
    key, offset = (int(value) & (2**64 - 1) for value in seed)
    w = philox(key, (site, 0, ((offset >> 32) << 3 & WORD) | 7, offset & WORD))
    return w[0] | w[1] << 32


def kept(places, columns, dropout, seed=SEED, site=0, head=0):
    """bool (R, columns); all of a row that stands for none."""
    limit, key = round(dropout * 2**32), site_key(seed, site)
    rows = []
    for place in places.tolist():
        row = [True] * columns
        for k in range(columns if place >= 0 else 0):
            words = philox(key, (k // 4, place & WORD, place >> 32, head))
            row[k] = words[k % 4] >= limit
        rows.append(row)
    return torch.tensor(rows, dtype=torch.bool).reshape(len(rows), columns)


def some_places(count, none=()):
    """Rows of sessions of one to seven items, large session numbers among them."""
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, 8, (count,), generator=generator)
    session = torch.arange(count).repeat_interleave(lengths)[:count]
    position = torch.cat([torch.arange(int(n)) for n in lengths] or [session])[:count]
    places = (session + (session % 3) * 70_000_003) << 32 | position
    places[list(none)] = -1
    return places


def factor(places, x, dropout, seed, site=0):
    """(R, W) in the dtype of x, for formulas."""
    if not dropout:
        return 1.0
    return kept(places, x.shape[1], dropout, seed.tolist(), site).to(x.device, x.dtype) / (
        1 - dropout
    )
