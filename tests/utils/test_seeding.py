from nasfast.utils.seeding import derive_seed


def test_derive_seed():
    assert derive_seed(7, 4) == derive_seed("7", 4) == 1328981751695773746
    stages = [(), ("stage0",)]
    seeds = {derive_seed(a, b, *stage) for a in range(9) for b in range(9) for stage in stages}
    assert len(seeds) == 162
    assert all(0 <= seed < 2**63 for seed in seeds)
