"""The mixed forward, in the order of a token's way: packs, batch, hosts, attention, attached; then what runs faster where it agrees."""
