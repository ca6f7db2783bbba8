"""``fastbert bench``: run the suite of benchmarks, compare two results, write the report."""
