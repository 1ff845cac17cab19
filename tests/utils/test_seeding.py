from nasfast.utils.seeding import derive_seed


def test_derive_seed():
    assert derive_seed(7, 4) == derive_seed("7", 4)
    assert derive_seed(7, 4) == 1328981751695773746
    seeds = {derive_seed(seed, index, *stage) for seed in range(9) for index in range(9)
             for stage in ((), ("stage0",))}  # fmt: skip
    assert len(seeds) == 162
    assert all(0 <= seed < 2**63 for seed in seeds)
