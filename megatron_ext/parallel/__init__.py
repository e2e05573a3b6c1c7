"""How a run is laid out over ranks: which layouts are possible, the process groups of one, which part of a tensor a rank holds, ranks as local processes."""
