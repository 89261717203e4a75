"""From the runs and images of a session to verdicts, or to baselines; each verdict with what explains it."""
