"""Every order of events there is, within a bound, over the engine as it is shipped."""
