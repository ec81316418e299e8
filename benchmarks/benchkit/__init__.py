"""What the benchmarks in the folder above share: shapes, the reference's step, clocks, accounting, tables."""
