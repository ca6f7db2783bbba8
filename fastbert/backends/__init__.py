"""What every op needs and no op owns: the choice of an implementation, random numbers, the compiled extension."""
