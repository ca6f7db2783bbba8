"""The suite of benchmarks, run by ``fastbert bench``, and the scripts that tune, compile and predict kernels."""
