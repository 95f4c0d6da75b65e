"""The mixed forward, in the order in which a token passes it: packs, batch, hosts, attention, attached. The other files run faster, where
they agree."""
